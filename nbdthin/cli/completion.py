"""Completion for shells: what may stand at the end of a command line, by the command's own parser.

The scripts ask `nbdthin completion SHELL WORD...` each time, so that they are never older than the command, and names
come from the running daemon. A shell must not be held up or written to: where no daemon answers there are no names.
"""

from __future__ import annotations

import argparse
import socket
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbdthin.cli.verb import Verb, default_socket
from nbdthin.control import client
from nbdthin.errors import Error

PATIENCE = 1.0  # seconds for a daemon's answer
FILES = "/"  # instead of words: the shell knows better

# By metavar: the kind of the names, None for both. Names that are not there yet nobody can complete.
_NAMES = {
    **dict.fromkeys(("NAME", "OLD", "NAME_OR_URI", "NAME_OR_PATH")),
    **dict.fromkeys(("VOLUME", "CONTAINER"), "volume"),
    **dict.fromkeys(("SNAPSHOT", "BEFORE", "AFTER"), "snapshot"),
}
_FILES = set("ARCHIVE DEVICE DIR DIR_OR_NAME FILE FILE_OR_DEVICE FILE_OR_DIR PATH POOL XML".split())
_MAKES = {"create", "snapshot", "clone", "import", "receive", "base create", "container create"}  # their NAME is new
_BENEATH = {"base": "base/", "container": "container/"}  # the names of these verbs' NAME, which leave that out

BASH = r"""# bash: source <(nbdthin completion bash)
_nbdthin() {
    local IFS=$' \t\n' words lines current stays breaks=${COMP_WORDBREAKS//[^:=@]/}
    read -a words <<<"${COMP_LINE:0:COMP_POINT}x"  # COMP_WORDS is cut at the colons and the @ of names
    current=${words[-1]%x}
    words[-1]=$current
    mapfile -t lines < <("${words[0]}" completion bash "${words[@]:1}" 2>/dev/null)
    if [ "${lines[*]}" = / ]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
        return
    fi
    # What is before the last such place stays on the line, but for an @: readline replaces that, too.
    if [ -n "$breaks" ]; then
        stays=${current%"${current##*[$breaks]}"}
        lines=("${lines[@]#"${stays%@}"}")
    fi
    COMPREPLY=("${lines[@]}")
}
complete -F _nbdthin nbdthin
"""

ZSH = r"""#compdef nbdthin
# zsh: source <(nbdthin completion zsh), after compinit; or this as _nbdthin in a directory of $fpath
_nbdthin() {
    local -a lines
    lines=("${(@f)$("${(Q)words[1]}" completion zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    if [[ "$lines" == / ]]; then
        _files
    elif [[ -n "$lines" ]]; then
        _describe nbdthin lines
    fi
}
if [[ "${funcstack[1]}" == _nbdthin ]]; then _nbdthin "$@"; else compdef _nbdthin nbdthin; fi
"""

FISH = r"""# fish: nbdthin completion fish | source; or this as ~/.config/fish/completions/nbdthin.fish
function __nbdthin_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l lines ($words[1] completion fish $words[2..-1] "$current" 2>/dev/null)
    if test "$lines" = /
        __fish_complete_path "$current"
    else
        printf '%s\n' $lines
    end
end
complete -c nbdthin -f -a '(__nbdthin_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


@dataclass(frozen=True, slots=True)
class Candidate:
    word: str
    help: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    shell: str
    script: str | None  # None: candidates were asked for
    candidates: tuple[Candidate, ...] = ()


def candidates(parser: ArgumentParser, words: Sequence[str]) -> list[Candidate]:
    """What the last of `words`, which begins it, may become; the words before it are whole.

    One whose word is FILES says: the name of a file.
    """
    *before, current = words
    verb: list[str] = []
    given: list[str] = []  # positional arguments of the verb
    path = default_socket()
    option: Action | None = None  # whose value is next
    for word in before:
        if option is not None:
            path = word if option.dest == "socket" else path
            option = None
        elif word.startswith("--socket="):
            path = word.partition("=")[2]
        elif word.startswith("-"):
            found = parser._option_string_actions.get(word)
            option = found if found is not None and found.nargs != 0 else None
        elif (verbs := _verbs(parser)) is not None:
            if word not in verbs.choices:
                return []
            verb.append(word)
            parser = verbs.choices[word]
        else:
            given.append(word)
    if option is None and current.startswith("-"):
        found_options = list(_options(parser, before))
    elif option is None and (verbs := _verbs(parser)) is not None:
        found_options = [Candidate(each.dest, each.help or "") for each in verbs._choices_actions]
    else:
        wanted = option or _positional(parser, len(given))
        found_options = [] if wanted is None else list(_values(wanted, " ".join(verb), given, path, current))
    return [each for each in found_options if each.word.startswith(current) or each.word == FILES]


def _verbs(parser: ArgumentParser) -> argparse._SubParsersAction[ArgumentParser] | None:
    return next((each for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)


def _options(parser: ArgumentParser, before: Sequence[str]) -> Iterator[Candidate]:
    """Those that may still come."""
    for action in parser._actions:
        again = isinstance(action, argparse._AppendAction)
        if action.option_strings and (again or not set(action.option_strings) & set(before)):
            yield Candidate(action.option_strings[-1], action.help or "")


def _positional(parser: ArgumentParser, place: int) -> Action | None:
    """The argument behind `place` others; the last may take many."""
    actions = [each for each in parser._actions if not each.option_strings]
    if place < len(actions):
        return actions[place]
    return actions[-1] if actions and actions[-1].nargs in ("+", "*") else None


def _values(action: Action, verb: str, given: Sequence[str], path: str, current: str) -> Iterator[Candidate]:
    metavar = str(action.metavar)
    if action.choices:
        yield from (Candidate(str(each)) for each in action.choices)
    elif metavar in _FILES:
        yield Candidate(FILES)
    elif metavar in _NAMES and not (metavar == "NAME" and verb in _MAKES) and not _verb(verb).offline:
        beneath = _BENEATH.get(metavar.lower() if metavar == "CONTAINER" else verb.partition(" ")[0], "")
        names = (name.removeprefix(beneath) for name in _names(path, beneath + current, _NAMES[metavar]))
        yield from (Candidate(name) for name in names if name not in given)


def _verb(name: str) -> Verb:
    from nbdthin.cli import VERBS

    return VERBS[name]


def _names(path: str, prefix: str, kind: str | None) -> list[str]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with client.connect(path) as pool:
            return pool.names(prefix, kind)
    except Error:
        return []
    finally:
        socket.setdefaulttimeout(before)


# -- the verb


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=list(SCRIPTS), help="bash, zsh or fish")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="WORD",
        help="say what the last of these may become, as the script asks",
    )


def _completion(arguments: Namespace) -> Completion:
    from nbdthin.cli import make_parser

    if not arguments.words:
        return Completion(arguments.shell, SCRIPTS[arguments.shell])
    return Completion(arguments.shell, None, tuple(candidates(make_parser(), arguments.words)))


def _show(completion: Completion) -> None:
    if completion.script is not None:
        print(completion.script, end="")
    for each in completion.candidates:
        match completion.shell:
            case "zsh" if each.word != FILES:
                word = each.word.replace("\\", "\\\\").replace(":", "\\:")
                print(f"{word}:{each.help}" if each.help else word)
            case "fish" if each.help:
                print(f"{each.word}\t{each.help}")
            case _:
                print(each.word)


VERBS: dict[str, Verb] = {
    "completion": Verb("completion of verbs, options and names for a shell", _arguments, _completion, _show),
}
