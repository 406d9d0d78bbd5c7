"""The command `onevoice`, one page for each family of verbs.

In: the words of a command line. Out: the exit status, and what the verb prints. A verb is a thin function over the
package and imports what it needs when it runs, so that help appears at once. This room computes nothing, and no other
room imports it. A user's mistake ends in one line on standard error and exit status 2, never in a traceback.
"""

import difflib
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CoercionError, CycloptsError, Group, MissingArgumentError, Parameter, UnknownCommandError
from cyclopts.exceptions import ArgumentOrderError, RepeatArgumentError, UnknownOptionError, UnusedCliTokensError

from onevoice.cli import data, evaluation, live, reports, serving, training, using, voices
from onevoice.errors import OnevoiceError
from onevoice.processes import wait_asleep

app = App(
    name="onevoice",
    help="Target speaker extraction: give a recording of several people and a few seconds of one of them, and get "
    "back that one voice.",
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
app["--help"].group = app["--version"].group = Group("Options", sort_key=9)
app.command(using.extract, group=using.GROUP)
app.command(voices.enroll, group=using.GROUP)
app.command(voices.voices, group=using.GROUP)
app.command(live.live, group=using.GROUP)
app.command(serving.serve, group=using.GROUP)
app.command(using.demo, group=using.GROUP)
app.command(using.info, group=using.GROUP)
app.command(using.convert, group=using.GROUP)
app.command(live.export_, name="export", group=using.GROUP)
app.command(evaluation.eval_, name="eval", group=evaluation.GROUP)
app.command(evaluation.score, group=evaluation.GROUP)
app.command(training.train, group=training.GROUP)
app.command(training.average, group=training.GROUP)
app.command(training.schema, group=training.GROUP)
app.command(reports.report, group=reports.GROUP)
app.command(reports.compare, group=reports.GROUP)
app.command(data.mix, group=data.GROUP)
app.command(data.corpus_app)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with `argv` (the process's arguments by default) and exit."""
    arguments = [using.PIPE if word == "-" else word for word in (sys.argv[1:] if argv is None else argv)]
    if arguments[:1] != ["train"]:  # a training usually has the cores for itself
        wait_asleep()
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _fail(explain(error))
    except OnevoiceError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}; check the name and its permissions")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def explain(error: CycloptsError) -> str:
    """Return one line for a command line that does not fit: what is wrong, the nearest known word, where to look."""
    see = " ".join(["see onevoice", *(error.command_chain or ()), "--help"])
    match error:
        case UnknownCommandError():
            word = (error.unused_tokens or ["?"])[0]
            known = [name for name in (error.app or app) if not name.startswith("-")]
            return f"{word}: unknown command; {_nearest(word, known) or 'choose one of ' + ', '.join(known)}"
        case UnknownOptionError():
            word = error.token.keyword or error.token.value
            known = [name for argument in error.argument_collection for name in argument.names]
            return f"{word}: unknown option; {_nearest(word, known) or see}"
        case UnusedCliTokensError():
            return f"{' '.join(error.unused_tokens or ())}: too many arguments; {see}"
        case ArgumentOrderError() if error.argument is not None:
            return f"{error.argument.name}: is given by name and by place; give it once; {see}"
        case RepeatArgumentError():
            return f"{error.token.keyword}: appears twice; give it once"
        case MissingArgumentError() if error.argument is not None:
            name, (count, _) = error.keyword or error.argument.name, error.argument.token_count()
            if error.keyword is not None or error.argument.tokens:
                return f"{name}: needs {f'{count} values' if count > 1 else 'a value'}; {see}"
            name = name.lstrip("-").upper() if error.argument.field_info.is_positional else name
            return f"{name}: is missing; {see}"
        case CoercionError() if error.token is not None and error.argument is not None:
            kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(error.target_type or str)
            name = error.token.keyword or error.argument.name.lstrip("-").upper()
            return f"{name}: {error.token.value!r} is not {kind or 'a value for it'}; {see}"
    return " ".join(str(error).split())


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def _fail(message: str) -> None:
    line = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in message)
    print("onevoice: error:", line, file=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torch's threads may wait for other processes of the group, now gone
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)
