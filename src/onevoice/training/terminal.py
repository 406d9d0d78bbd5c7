"""What a run shows while it trains, on standard error: a bar on a terminal, otherwise one line per log step."""

import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm


class Display:
    """Shows steps, loss, speed and remaining time; `enabled=False` shows nothing."""

    def __init__(self, step: int, last_step: int, *, enabled: bool = True) -> None:
        self.enabled, self.last_step = enabled, last_step
        self.bar = tqdm(
            total=last_step, initial=step, unit="step", dynamic_ncols=True, disable=None if enabled else True
        )
        self.start(step)

    @property
    def has_bar(self) -> bool:
        """Whether standard error is a terminal, which shows a bar."""
        return not self.bar.disable

    def start(self, step: int) -> None:
        """Measure speed from here, after a pause such as a validation."""
        self.measured_step, self.measured_time = step, time.monotonic()

    def update(self) -> None:
        """Show one more step."""
        self.bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a log line."""
        results = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        results += [f"SI-SDR {values['si_sdr_db']:.2f} dB"] if "si_sdr_db" in values else []
        if self.has_bar:
            self.bar.set_postfix_str(", ".join(results), refresh=False)
        elif self.enabled:
            speed = (step - self.measured_step) / max(time.monotonic() - self.measured_time, 1e-9)
            self.start(step)
            results += [
                f"learning rate {values['learning_rate']:.3g}",
                f"{speed:.3g} steps/s",
                f"{tqdm.format_interval((self.last_step - step) / speed)} left",
            ]
            print(f"step {step}/{self.last_step}: {', '.join(results)}", file=sys.stderr, flush=True)

    def say(self, line: str, echo: Callable[[str], None]) -> None:
        """Call `echo(line)` without garbling the bar."""
        if not self.has_bar:
            echo(line)
            return
        with tqdm.external_write_mode():
            echo(line)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
