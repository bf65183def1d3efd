"""Man pages from what is there already: the command's own parser, and docs/cli.md, whose sections are the descriptions.

nbdthin.1 has what holds for all verbs, nbdthin-VERB.1 is one for each, nbdthin-exports.toml.5 the configuration. Only
the Markdown that docs/cli.md uses is understood: headings, paragraphs, lists, indented and fenced blocks, tables.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from nbdthin import __version__
from nbdthin.cli import VERBS, make_parser

DOCS = Path(__file__).parent.parent / "docs/cli.md"
CONFIG = "exports.toml"  # the heading of its section
NOT_FOR_USERS = {CONFIG, "The control protocol"}  # headings that are no part of nbdthin.1
WIDTH = 80


# -- roff


def inline(text: str) -> str:
    """One paragraph of Markdown as roff, in lines."""
    text = re.sub(r"\[([^]]*)\]\((https?:[^)]*)\)", r"\1 (\2)", text)
    text = re.sub(r"\[([^]]*)\]\(#exportstoml\)", rf"\1 (see `nbdthin-{CONFIG}`(5))", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    parts = re.split(r"(`[^`]+`|\*\*[^*]+\*\*|(?<!\w)\*[^* ][^*]*\*)", text)
    joined = "".join(_styled(part) for part in parts)
    lines = textwrap.wrap(joined, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"\\&{line}" if line[0] in ".'" else line for line in lines)


def _styled(part: str) -> str:
    if part.startswith("`"):
        return rf"\fB{typed(part[1:-1])}\fR"
    if part.startswith("**"):
        return rf"\fB{escaped(part[2:-2])}\fR"
    if part.startswith("*") and len(part) > 1:
        return rf"\fI{escaped(part[1:-1])}\fR"
    return escaped(part)


def escaped(text: str) -> str:
    return "".join(rf"\[u{ord(c):04X}]" if ord(c) > 126 else {"\\": r"\e"}.get(c, c) for c in text)


def typed(text: str) -> str:
    """What is typed on a keyboard: a - is no hyphen."""
    return escaped(text).replace("-", r"\-")


def verbatim(lines: list[str]) -> str:
    text = "\n".join(typed(line) for line in textwrap.dedent("\n".join(lines)).splitlines())
    text = re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)
    return f".PP\n.RS 4\n.nf\n{text}\n.fi\n.RE"


def tagged(tag: str, text: str) -> str:
    return f".TP\n{inline(tag)}\n{inline(text) or chr(92) + '&'}"


def table(lines: list[str]) -> str:
    """A tag and its text for each row: man pages have no columns to spare."""
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    result = []
    for row in rows:
        more = [f"{name.capitalize()}: {cell}." for name, cell in zip(header[2:], row[2:], strict=True) if cell]
        text = " ".join([row[1] if not more or not row[1] else f"{row[1].rstrip('.')}.", *more])
        result.append(tagged(row[0], text))
    return "\n".join(result)


def roff(text: str) -> str:
    """The blocks of some Markdown without headings."""
    return "\n".join(_blocks(text.splitlines()))


def _blocks(lines: list[str]) -> Iterator[str]:
    while lines:
        line = lines[0]
        if not line.strip():
            lines = lines[1:]
            continue
        if line.startswith("```"):
            end = lines.index("```", 1)
            yield verbatim(lines[1:end])
            lines = lines[end + 1 :]
            continue
        kind = _kind(line)
        count = 1
        while count < len(lines) and _goes_on(kind, lines[count]):
            count += 1
        block, lines = lines[:count], lines[count:]
        match kind:
            case "    ":
                yield verbatim(block)
            case "|":
                yield table(block)
            case "- ":
                yield f".IP \\(bu 2\n{inline(' '.join(part.strip() for part in block)[2:])}"
            case _:
                yield f".PP\n{inline(' '.join(block))}"


def _kind(line: str) -> str:
    return next((kind for kind in ("    ", "|", "- ") if line.startswith(kind)), "")


def _goes_on(kind: str, line: str) -> bool:
    match kind:
        case "    " | "|":
            return line.startswith(kind)
        case "- ":
            return line.startswith("  ")
        case _:
            return bool(line.strip()) and not _kind(line) and not line.startswith("```")


# -- docs/cli.md


def sections(text: str, level: int) -> dict[str, str]:
    """What stands below each heading of a level; under "" what is before the first."""
    parts = re.split(rf"^{'#' * level} (.*)\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


# -- pages


def page(name: str, number: int, doc: str, body: list[str], see: list[str]) -> str:
    # Reproducible: the same sources make the same page.
    stamp = int(os.environ.get("SOURCE_DATE_EPOCH") or DOCS.stat().st_mtime)
    date = time.strftime("%Y-%m-%d", time.gmtime(stamp))
    also = ",\n".join(f".BR {each}" for each in see).replace(",\n", " ,\n")
    head = f'.TH {name.upper()} {number} {date} "nbdthin {__version__}" nbdthin'
    names = f".SH NAME\n{escaped(name)} \\- {escaped(doc)}"
    text = "\n".join([head, names, *body, f".SH SEE ALSO\n{also}", ""])
    return re.sub(r"^(\.S[HS] .*\n)\.PP\n", r"\1", text, flags=re.MULTILINE)  # a paragraph begins there anyway


def page_name(verb: str) -> str:
    return f"nbdthin-{verb.replace(' ', '-')}"


def options(parser: ArgumentParser) -> str:
    rows = [tagged(_usage(action), (action.help or "").replace("%%", "%")) for action in _told(parser)]
    return "\n".join([".SH OPTIONS", *rows])


def _told(parser: ArgumentParser) -> list[Action]:
    return [
        action
        for action in parser._actions
        if action.option_strings or (action.help and not isinstance(action, argparse._SubParsersAction))
    ]


def _usage(action: Action) -> str:
    if not action.option_strings:
        return f"*{action.metavar}*"
    names = ", ".join(f"`{each}`" for each in action.option_strings)
    return names if action.nargs == 0 else f"{names} *{action.metavar}*"


def verb_page(parser: ArgumentParser, name: str, section: str) -> str:
    """`parser` is the whole command's; `section` begins with the usage."""
    usage, _, text = section.strip("\n").partition("\n\n")
    doc = VERBS[name].doc
    body = [
        f".SH SYNOPSIS\n{verbatim(usage.splitlines())}",
        f".SH DESCRIPTION\n{roff(text) or inline(f'{doc[0].upper()}{doc[1:]}.')}",
        options(_parser_of(parser, name)),
    ]
    return page(page_name(name), 1, doc, body, ["nbdthin (1)"])


def _parser_of(parser: ArgumentParser, name: str) -> ArgumentParser:
    for word in name.split():
        (verbs,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        parser = verbs.choices[word]
    return parser


def main_page(parser: ArgumentParser, chapters: dict[str, str]) -> str:
    intro = sections(chapters[""], 1)
    body = [
        ".SH SYNOPSIS\n" + verbatim(["nbdthin [--json] [--socket PATH] VERB ..."]),
        f".SH DESCRIPTION\n{roff(''.join(intro.values()))}",
        options(parser),
        ".SH VERBS",
    ]
    others = []
    for title, chapter in chapters.items():
        verbs = sections(chapter, 3)
        if not title or title in NOT_FOR_USERS:
            continue
        text = roff(verbs.pop(""))
        if not verbs:
            others.append(f".SH {escaped(title.upper())}\n{text}")
            continue
        rows = []
        for heading in verbs:
            verb = heading.removeprefix("nbdthin ")
            rows.append(tagged(f"`{page_name(verb)}`(1)", VERBS[verb].doc))
        body.append("\n".join(part for part in (f".SS {escaped(title)}", text, *rows) if part))
    see = [f"nbdthin\\-{CONFIG} (5)"]
    doc = "thin volumes and snapshots, served as network block devices"
    return page("nbdthin", 1, doc, [*body, *others], see)


def pages() -> dict[str, str]:
    """By file name."""
    chapters = sections(DOCS.read_text(encoding="utf-8"), 2)
    parser = make_parser()
    result = {"man1/nbdthin.1": main_page(parser, chapters)}
    for chapter in chapters.values():
        for heading, text in sections(chapter, 3).items():
            if heading:
                verb = heading.removeprefix("nbdthin ")
                result[f"man1/{page_name(verb)}.1"] = verb_page(parser, verb, text)
    config = f".SH DESCRIPTION\n{roff(chapters[CONFIG])}"
    name = f"nbdthin-{CONFIG}"
    result[f"man5/{name}.5"] = page(name, 5, "configuration of nbdthin serve", [config], ["nbdthin (1)"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        "tools/man", description="Write the man pages of nbdthin into man1/ and man5/ below DIR."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="such as /usr/local/share/man; made if need be")
    directory: Path = parser.parse_args().directory
    try:
        for name, text in pages().items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")
    except OSError as error:
        sys.exit(f"tools/man: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
