"""The page of one or several results: their numbers, differences and distributions, and trials to listen to."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from onevoice.errors import ConfigError, OnevoiceError
from onevoice.evaluation.compare import compare, format_p, numbers_of, short_names, title_of, unit_of
from onevoice.evaluation.listening import pool_word_errors
from onevoice.evaluation.metrics import MetricName
from onevoice.evaluation.results import IMPROVEMENT, Result, read_result
from onevoice.evaluation.samples import Sounds, open_sounds
from onevoice.report.charts import Points, histogram, scatter
from onevoice.report.page import Section, page, settings_table, table, text
from onevoice.report.players import HOW_TO_LISTEN, Track, players
from onevoice.rng import derive

GAIN: MetricName = "si_sdr_improvement"
GROUPS = {
    "gender_pair": "genders of target and interferer",
    "input_snr_db": "input SNR (dB)",
    "enrollment_seconds": "enrollment (s)",
    "corpus": "corpus",
}
PLAYED_TRIALS = 10
"""Worst, best, and random trials to listen to, each."""
NUMBERS = ("metrics", "mixture", "groups", "trials", "target_present", "target_absent", "failure_rate")
"""Keys of a summary that the page shows elsewhere than under what the numbers depend on."""


def results_report(paths: Sequence[Path], device: str = "auto", played: int = PLAYED_TRIALS) -> str:
    """Return the page of one or several results; `played` is the number of worst, best and random trials to hear.

    Raises `ConfigError` if a file is no result.
    """
    results = [read_result(path) for path in paths]
    names = short_names(results)
    title = f"Evaluation {names[0]}" if len(results) == 1 else f"Evaluations {', '.join(names)}"
    sections = [
        *result_sections(results),
        *_trials_to_hear(results, names, device, played),
        _provenance(results, names),
    ]
    return page(title, _subtitle(results, names), sections)


def result_sections(results: Sequence[Result]) -> list[Section]:
    """Return the sections with the numbers of results: metrics, differences, groups, distributions.

    Raises `ConfigError` if a summary is damaged.
    """
    names = short_names(results)
    try:
        return [
            Section("Metrics", [*_metrics(results, names), *_rates(results, names)]),
            Section("Differences", _differences(results), "Trial by trial, to the first result."),
            Section("Groups", _groups(results, names), "Trials with a target. Intervals are bootstrap 95 % intervals."),
            Section("Distributions", _histograms(results, names), is_grid=True),
            Section("Trials", _scatters(results, names), is_grid=True),
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{results[0].path}: not a result of onevoice eval --output ({error})") from error


def _subtitle(results: Sequence[Result], names: Sequence[str]) -> str:
    parts = []
    for name, result in zip(names, results, strict=True):
        mean = result.summary["metrics"].get(GAIN, {}).get("mean")
        gain = "" if mean is None else f"{mean:.2f} dB SI-SDRi, "
        parts.append(f"{'' if len(results) == 1 else f'{name}: '}{gain}{len(result.rows)} trials of {_place(result)}")
    return " · ".join(parts)


def _statistics(each: Mapping[str, Any]) -> tuple[Any, ...]:
    interval = each["interval_95"]
    span = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return each["mean"], span, each["median"], each["percentile_5"], each["count"]


def _metrics(results: Sequence[Result], names: Sequence[str]) -> list[Markup]:
    """Return the table of all metrics, the same metric of all results together, and the mixture before them."""
    columns = dict.fromkeys(column for result in results for column in result.summary["metrics"])
    rows: list[tuple[Any, ...]] = []
    for column in columns:
        before = next(
            (result.summary["mixture"][column] for result in results if column in result.summary.get("mixture", {})),
            None,
        )
        title = f"{title_of(column)}{f' ({unit_of(column).strip()})' if unit_of(column) else ''}"
        if before is not None:
            rows.append((title, "mixture", *_statistics(before)))
        rows += [
            (title, name, *_statistics(result.summary["metrics"][column]))
            for name, result in zip(names, results, strict=True)
            if column in result.summary["metrics"]
        ]
    head = ("metric", "of", "mean", "95 % interval of the mean", "median", "5th percentile", "trials")
    return [table("Metrics", head, rows)]


def _rates(results: Sequence[Result], names: Sequence[str]) -> list[Markup]:
    """Return the tables of failures and confusions, trials without a target, and word errors, where there are any."""
    rows, words = [], []
    for name, result in zip(names, results, strict=True):
        summary = result.summary
        attenuation = summary.get("attenuation_db") or {}
        speed = summary.get("speed") or {}
        rows.append(
            (
                name,
                summary["trials"],
                _percent(summary["failure_rate"]),
                _percent(summary.get("confusion_rate")),
                summary.get("target_absent"),
                *(attenuation.get(key) for key in ("mean", "median")),
                speed.get("real_time_factor"),
            )
        )
        pooled = pool_word_errors(row.more for row in result.rows)
        if pooled:
            words.append((name, *(_percent(pooled[key]) for key in ("mixture_wer", "wer", "target_wer"))))
    head = (
        *("result", "trials", "failures", "confusions", "absent targets"),
        *("attenuation, mean (dB)", "median (dB)", "real-time factor"),
    )
    about = "Failures gain less than 1 dB SI-SDRi; confusions gain more toward the interferer than toward the target."
    tables = [table("Rates", head, rows), text(about)]
    if words:
        tables.append(table("Word error rates", ("result", "mixture", "estimate", "clean target"), words))
    return tables


def _differences(results: Sequence[Result]) -> list[Markup]:
    """Return a table of paired differences to the first result, if there are several."""
    if len(results) < 2:
        return []
    try:
        comparisons = compare(results, common=True)
    except ConfigError as error:
        return [text(f"{error}.")]
    rows = [
        (each.other, title_of(column), d.reference, d.other, d.difference, "{:+.3f} to {:+.3f}".format(*d.interval_95),
         format_p(d.p), d.higher, d.lower, d.count)
        for each in comparisons
        for column, d in each.differences.items()
    ]  # fmt: skip
    head = (
        *("result", "metric", f"mean of {comparisons[0].reference}", "mean", "difference", "95 % interval"),
        *("Wilcoxon p", "higher", "lower", "trials"),
    )
    return [table("Paired differences", head, rows), *(text(f"{note}.") for note in comparisons[0].notes)]


def _groups(results: Sequence[Result], names: Sequence[str]) -> list[Markup]:
    tables = []
    for key, title in GROUPS.items():
        found = [result.summary.get("groups", {}).get(key, {}) for result in results]
        labels = list(dict.fromkeys(label for groups in found for label in groups))
        rows = [
            (label, name, group["trials"], gain.get("mean"), _interval(gain), _percent(group["failure_rate"]),
             _percent(group["confusion_rate"]))
            for label in labels
            for name, groups in zip(names, found, strict=True)
            if label in groups
            for group in (groups[label],)
            for gain in (group["metrics"].get(GAIN, {}),)
        ]  # fmt: skip
        if len(labels) > 1:
            head = (title, "result", "trials", "SI-SDRi (dB)", "95 % interval", "failures", "confusions")
            tables.append(table(f"By {title}", head, rows))
    return tables


def _histograms(results: Sequence[Result], names: Sequence[str]) -> list[Markup]:
    """Return a histogram of each metric of the estimates; improvements other than SI-SDRi only shift what is shown."""
    names_of_numbers = dict.fromkeys(column for result in results for row in result.rows for column in numbers_of(row))
    columns = [each for each in names_of_numbers if each != GAIN and not each.endswith(IMPROVEMENT)]
    charts = []
    for column in (GAIN, *columns):
        series = {
            name: [numbers_of(row).get(column) for row in result.rows]
            for name, result in zip(names, results, strict=True)
        }
        if any(value is not None for values in series.values() for value in values):
            charts.append(histogram(title_of(column), series, unit=unit_of(column).strip()))
    return charts


def _scatters(results: Sequence[Result], names: Sequence[str]) -> list[Markup]:
    """Return SI-SDRi by input SNR and by length of the enrollment, and that of each result against the first."""
    gains = [{row.name: row.values.get(GAIN) for row in result.rows} for result in results]

    def by(value: Callable[[Any], float | None]) -> dict[str, Points]:
        found: dict[str, Points] = {}
        for name, result in zip(names, results, strict=True):
            points = [(x, row.values.get(GAIN)) for row in result.rows for x in (value(row),) if x is not None]
            if any(y is not None for _, y in points):
                found[name] = ([x for x, _ in points], [y for _, y in points])
        return found

    charts = [
        scatter(f"SI-SDRi by {title}", series, x_label=label, y_label="SI-SDRi (dB)")
        for title, label, series in (
            ("SI-SDR of the mixture", "SI-SDR of the mixture (dB)", by(_input_snr_db)),
            ("length of the enrollment", "enrollment (s)", by(lambda row: row.enrollment_seconds)),
        )
        if series
    ]
    for name, other in list(zip(names, gains, strict=True))[1:]:
        pairs = [(x, other.get(trial)) for trial, x in gains[0].items() if x is not None]
        if any(y is not None for _, y in pairs):
            points = ([x for x, _ in pairs], [y for _, y in pairs])
            charts.append(scatter(f"SI-SDRi of {name} against {names[0]}", {name: points}, x_label=f"{names[0]} (dB)",
                                  y_label=f"{name} (dB)"))  # fmt: skip
    return charts


def _input_snr_db(row: Any) -> float | None:
    """Return the SI-SDR of the mixture, which rows of earlier versions have only as a difference."""
    if row.input_snr_db is not None:
        return float(row.input_snr_db)
    after, gain = row.values.get("si_sdr"), row.values.get(GAIN)
    return None if after is None or gain is None else after - gain


def choose_trials(result: Result, count: int) -> dict[str, list[str]]:
    """Return the names of the worst and best trials by SI-SDRi, and of random other ones, always the same."""
    gains = [(row.values[GAIN], row.name) for row in result.rows if row.values.get(GAIN) is not None]
    ranked = [name for _, name in sorted(gains)]
    worst = ranked[:count]
    best = [name for name in ranked[::-1][:count] if name not in worst]
    rest = sorted(name for name in ranked if name not in worst and name not in best)
    picked = derive(0, "report", *rest).permutation(len(rest))[:count]
    return {"Worst": worst, "Best": best, "Random": [rest[number] for number in sorted(picked)]}


def _trials_to_hear(results: Sequence[Result], names: Sequence[str], device: str, count: int) -> list[Section]:
    """Return a section of players each for the worst, best and random trials of the first result."""
    chosen = choose_trials(results[0], count)
    if not any(chosen.values()):
        return []
    sources: dict[str, Callable[[str], Sounds]] = {}
    faults = []
    for name, result in zip(names, results, strict=True):
        try:
            sources[name] = open_sounds(result, device)
        except OnevoiceError as error:
            faults.append(text(f"{name} cannot be heard: {error}."))
    sections = [Section("Sounds", faults)]
    by = "" if len(results) == 1 else f" of {names[0]}"
    for title, trials in chosen.items():
        pieces = [_players(trial, results, names, sources) for trial in trials] if sources else []
        note = f"{title} SI-SDRi{by}. " if title != "Random" else "Drawn from the other trials. "
        sections.append(Section(f"{title} trials", pieces, f"{note}{HOW_TO_LISTEN}"))
    return sections


def _players(
    trial: str, results: Sequence[Result], names: Sequence[str], sources: Mapping[str, Callable[[str], Sounds]]
) -> Markup:
    tracks: list[Track] = []
    facts: list[str] = []
    for name, result in zip(names, results, strict=True):
        row = result.row(trial)
        if row is not None and not facts and row.input_snr_db is not None:
            facts.append(f"Input {row.input_snr_db:.1f} dB.")
        if row is not None:
            facts.append(f"{_scores(row, '' if len(results) == 1 else name)}.")
        if row is None or name not in sources:
            continue
        try:
            sounds = sources[name](trial)
        except OnevoiceError as error:
            facts.append(f"{name} cannot be heard: {error}.")
            continue
        item, rate = sounds.item, sounds.sample_rate
        if not tracks:
            tracks = [Track("mixture", item.mixture, rate), Track("target", item.target, rate)]
            enrollment = Track("enrollment", item.enrollment, rate, is_aligned=False)
        tracks.append(Track("estimate" if len(results) == 1 else f"estimate of {name}", sounds.estimate, rate))
        facts += [sounds.note] if sounds.note else []
    return (
        players(trial, [*tracks, enrollment], note=" ".join(facts)) if tracks else text(f"{trial}: {' '.join(facts)}")
    )


def _scores(row: Any, name: str) -> str:
    """Return the scores of a trial in a few words."""
    shown = [(column, row.numbers.get(column)) for column in (GAIN, "pesq", "stoi", "similarity", "wer")]
    scores = ", ".join(
        f"{title_of(column)} {value:.2f}{unit_of(column)}" for column, value in shown if value is not None
    )
    more = ", gains more toward the interferer" if row.confused else ""
    return f"{name}{': ' if name else ''}{scores}{more}"


def _provenance(results: Sequence[Result], names: Sequence[str]) -> Section:
    tables = [
        settings_table(
            f"{name}.json",
            {key: value for key, value in result.summary.items() if key not in NUMBERS},
            is_open=len(results) == 1,
        )
        for name, result in zip(names, results, strict=True)
    ]
    return Section("What the numbers depend on", tables)


def _place(result: Result) -> str:
    data = result.summary.get("data")
    values = data if isinstance(data, dict) else {}
    return str(next((values[key] for key in ("folder", "root", "metadata", "lists") if key in values), "a data set"))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _interval(statistics: Mapping[str, Any]) -> str:
    interval = statistics.get("interval_95")
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
