"""A task of one's own, made up: support tickets for four teams, whose names are of two words.

    python tools/tickets.py DIR [--seed N]

DIR gets tickets.toml and train.jsonl, dev.jsonl, test.jsonl, as a user would write them, for

    hizoo-lite train --model MODEL --task DIR/tickets.toml --data DIR --out RUN

A ticket says what is wrong in one or two phrases that only its team's tickets have, between a greeting, a
place, a time and a closing that all have. No ticket is there twice. The same seed makes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

#: What is wrong, by team; every phrase has a word that no other team's has.
TROUBLES: Mapping[str, Sequence[str]] = {
    "Billing desk": (
        "the invoice for March lists a plan we never ordered",
        "I was charged twice for the same month",
        "the refund you promised has not arrived",
        "our direct debit was taken a week early",
        "the receipt has the wrong company name on it",
        "the discount from the offer is missing on the bill",
        "we need the VAT number added before we pay",
    ),
    "Network team": (
        "the wifi drops every few minutes",
        "the VPN connects and then nothing loads",
        "half of our packets never reach the branch office",
        "the router blinks red and will not restart",
        "no DNS name resolves, only bare addresses work",
        "the download speed has fallen to almost nothing",
        "the network cable in the wall seems to be dead",
    ),
    "Access control": (
        "my password was reset and the new one is refused",
        "my badge no longer opens the side door",
        "the login page says that my account is locked",
        "the two-factor code never reaches my phone",
        "I lack the permission to read the shared folder",
        "a colleague has left and still has a key card",
        "the new trainee cannot sign in anywhere",
    ),
    "Field repair": (
        "the printer jams on every second page",
        "the screen of my laptop is cracked",
        "the projector shows only a green stripe",
        "three keys of my keyboard are stuck",
        "the fan howls as soon as I switch it on",
        "the battery swells and the case does not close",
        "the docking station smells burnt",
    ),
}
_OPENINGS = ("Hello,", "Hi there,", "Good morning,", "Dear team,", "Hey,", "To whom it may concern:")
_PLACES = (
    "on the second floor",
    "in the Leeds office",
    "at the front desk",
    "in room 14",
    "at home",
    "in hall B",
)
_TIMES = (
    "since Monday",
    "since this morning",
    "for the third day",
    "since the holiday",
    "after lunch",
    "again",
)
_CLOSINGS = (
    "Please help.",
    "Thanks in advance.",
    "It is rather urgent.",
    "No rush.",
    "Who can look at it?",
    "",
)
_FORMS = (
    "{opening} {first} {time}. {closing}",
    "{opening} I sit {place}, and {first}. {closing}",
    "{first}, {time}. {closing}",
    "{opening} {first}, and {second}. I am {place}. {closing}",
    "{opening} {time} {first}. {closing}",
    "{first}; {second}, too. {closing}",
)
TASK = """name = "tickets"
kind = "choice"
prompt = "Ticket: {text}\\nTeam:"
label_field = "team"
cut = "text"

[answers]
"""
PARTS: Mapping[str, int] = {"train": 260, "dev": 60, "test": 60}


def tickets(count: int, seed: int) -> list[dict[str, str]]:
    """So many tickets, as many of each team, all different, in random order."""
    draw, teams, found = random.Random(seed), list(TROUBLES), dict[str, str]()
    while len(found) < count:
        team = teams[len(found) % len(teams)]
        first, second = draw.sample(TROUBLES[team], 2)
        said = {"opening": _OPENINGS, "place": _PLACES, "time": _TIMES, "closing": _CLOSINGS}
        words = {name: draw.choice(options) for name, options in said.items()}
        text = draw.choice(_FORMS).format(first=first, second=second, **words).strip()
        found.setdefault(text[0].upper() + text[1:], team)
    rows = [{"text": text, "team": team} for text, team in found.items()]
    draw.shuffle(rows)
    return rows


def write(folder: Path, seed: int = 0) -> Path:
    """The files of the task in a folder; the path of its .toml."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = iter(tickets(sum(PARTS.values()), seed))
    for part, count in PARTS.items():
        lines = [json.dumps(next(rows)) + "\n" for _ in range(count)]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    task = folder / "tickets.toml"
    task.write_text(TASK + "".join(f'"{team}" = " {team}"\n' for team in TROUBLES))
    return task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    print(write(arguments.folder, arguments.seed))


if __name__ == "__main__":
    main()
