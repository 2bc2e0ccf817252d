"""What texts of a row should not hold: placeholders, keys, personal data, broken characters.

Every pattern runs in time linear in the text. Found secrets are never repeated in a message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from eightgig.data.rules import Notes

# Kind of secret -> what each of them holds, and its pattern. Most texts hold none of the first.
_SECRETS: Mapping[str, tuple[tuple[str, ...], re.Pattern[str]]] = MappingProxyType(
    {
        "a private key": (
            ("-----BEGIN",),
            re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"),
        ),
        "an AWS access key": (
            ("AKIA", "ASIA"),
            re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
        ),
        "a GitHub token": (
            ("gho_", "ghp_", "ghr_", "ghs_", "ghu_", "github_pat_"),
            re.compile(r"\b(?:gh[oprsu]_[A-Za-z0-9]{36}|github_pat_\w{50,90})\b"),
        ),
        "a Hugging Face token": (("hf_",), re.compile(r"\bhf_[A-Za-z0-9]{30,40}\b")),
        "an API key": (
            ("sk-",),
            re.compile(r"\bsk-(?:proj-|ant-|live-)?[A-Za-z0-9_-]{32,200}"),
        ),
        "a Slack token": (
            ("xoxa-", "xoxb-", "xoxp-", "xoxr-", "xoxs-"),
            re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,80}"),
        ),
        "a Google API key": (("AIza",), re.compile(r"\bAIza[0-9A-Za-z_-]{35}")),
        "a signed web token": (
            ("eyJ",),
            re.compile(r"\beyJ[\w-]{10,400}\.eyJ[\w-]{10,2000}\.[\w-]{10,600}"),
        ),
        "an address with a password": (
            ("://",),
            re.compile(r"\b[a-z]{3,12}://[^\s/:@]{1,60}:([^\s/@]{3,80})@([\w.-]{0,80})"),
        ),
    }
)
_SAMPLE_PASSWORDS = frozenset(
    {"pass", "passwd", "password", "pwd", "pw", "secret", "changeme", "postgres", "root", "xxx"}
)
_STAND_IN_PASSWORD = re.compile(r"[<>{}$\[\]]|^[*x]+$", re.IGNORECASE)
_MAIL = re.compile(r"\b([\w.+-]{1,64})@([\w-]{1,63}(?:\.[\w-]{1,63}){1,4})\b")
# Addresses of no person: of offices, and of programs (git@github.com:owner/name).
_OFFICES = frozenset(
    {"admin", "contact", "git", "hello", "help", "hr", "info", "jobs", "mail", "no-reply",
     "noreply", "office", "orders", "press", "sales", "security", "service", "support", "team",
     "user", "username", "webmaster", "your.email", "youremail", "you"}
)  # fmt: skip
_SAMPLE_DOMAINS = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$"
)
# What may not go before is asked behind the first character, so that few are looked at twice.
_CARD = re.compile(r"[3-6](?<![\d.,-].)(?:[ -]?\d){12,18}(?![\d.,-]?\d)")
_IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")

_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`", re.DOTALL)
_CODE_SIGNS = ("def ", "import ", "print(", "function ", "=>", "</", "#include", "class ",
               "return ", 'f"', "f'", "{%", "console.", "const ", "{{#", "{{/", "{{>", "{{-",
               "${{")  # fmt: skip
# Names between braces; with anything else it is an expression of a template language.
_PLACEHOLDER = re.compile(
    r"\{\{ ?(?!(?:this|else|end|yield)\b)[A-Za-z_]\w{0,40}(?:[ .]\w{1,40}){0,4} ?\}\}"
    r"|\{(?:instruction|input|output|question|answer|response|context|prompt|completion|query)\}"
    r"|[\[<](?:INSERT|YOUR|ENTER|PLACEHOLDER|TODO|FILL)"
    r"(?![A-Za-z _]{0,40}(?:KEY|TOKEN|SECRET|PASSWORD|ID|URL|HOST|PATH)\b)[A-Za-z _]{0,40}[\]>]"
    r"|\[(?:[Yy]our|[Ii]nsert|[Ee]nter) [A-Za-z _']{1,40}\]"
    r"|\b[Ll]orem ipsum dolor"
)
_ABOUT_PLACEHOLDERS = re.compile(
    r"placeholder|template|variable|curly|brac(?:es|kets)|jinja|mustache|handlebars|liquid|ansible"
    r"|helm\b|\bvue\b|lorem ipsum (?!dolor)|platzhalter|vorlage|plantilla|modèle",
    re.IGNORECASE,
)
_SPEAKER = re.compile(
    r"^(?:### ?(?:Response|Assistant|Answer|Output)|Assistant|ASSISTANT|AI|Bot) ?:", re.MULTILINE
)
_STAND_INS = frozenset({"nan", "null", "undefined", "<na>", "#n/a", "#ref!", "#value!"})
_STAND_IN_CHARS = 40  # with blanks around it
_MOJIBAKE = re.compile("\u00c3[\u0080-\u00bf]|\u00e2\u20ac[\u0080-\u2122]|\u00c2[\u00a0-\u00bf]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def check_text(text: str, place: str, notes: Notes) -> None:
    """Note what is wrong with one text of a row.

    Args:
        text: The text.
        place: Where it stands, for example `turn 2`.
        notes: Findings are added here.
    """
    if len(text) <= _STAND_IN_CHARS and text.strip().lower() in _STAND_INS:
        message = f'The text of {place} is only "{text.strip()}".'
        notes.add("data.stand_in", message)
    found = _CONTROL.search(text)
    if found is not None:
        code = f"U+{ord(found.group()):04X}"
        notes.add("data.control_character", f"The text of {place} holds the character {code}.")
    found = None if text.isascii() else _MOJIBAKE.search(text)
    if found is not None or "\ufffd" in text:
        sample = "\ufffd" if found is None else found.group()
        notes.add("data.mojibake", f'The text of {place} holds "{sample}".')
    placeholder = find_placeholder(text)
    if placeholder is not None:
        notes.add("data.placeholder", f'The text of {place} holds "{placeholder}".')
    secret = find_secret(text)
    if secret is not None:
        notes.add("data.secret", f"The text of {place} looks as if it held {secret}.")
    personal = find_personal(text)
    if personal is not None:
        notes.add("data.personal", f"The text of {place} looks as if it held {personal}.")


def is_about_placeholders(text: str) -> bool:
    """Whether a row speaks of placeholders, so that those in it are meant."""
    return _ABOUT_PLACEHOLDERS.search(text) is not None


def check_plain_text(text: str, notes: Notes) -> None:
    """Note where a row of plain text looks like a conversation."""
    found = _SPEAKER.search(text)
    if found is not None:
        message = f'The text looks like a conversation: it holds "{found.group().strip()}".'
        notes.add("data.prompt_in_text", message)


def find_placeholder(text: str) -> str | None:
    """A placeholder that was never filled in; code is not looked at."""
    if not any(sign in text for sign in ("{", "[", "<", "orem ipsum")):
        return None
    prose = _CODE.sub("", text) if "`" in text else text
    if any(sign in prose for sign in _CODE_SIGNS):
        return None
    found = _PLACEHOLDER.search(prose)
    return None if found is None else found.group()


def find_secret(text: str) -> str | None:
    """The kind of key or token that `text` holds, as far as it can be told."""
    for kind, (hints, pattern) in _SECRETS.items():
        if any(hint in text for hint in hints):
            found = pattern.search(text)
            if found is not None and not _is_sample(found):
                return kind
    return None


def _is_sample(found: re.Match[str]) -> bool:
    """Whether an address with a password is one of those that manuals write."""
    if found.lastindex is None:
        return False
    password, host = found.groups()
    return (
        password.lower() in _SAMPLE_PASSWORDS
        or _STAND_IN_PASSWORD.search(password) is not None
        or _SAMPLE_DOMAINS.search(host.lower()) is not None
    )


def find_personal(text: str) -> str | None:
    """The kind of personal data that `text` holds, as far as it can be told."""
    if "@" in text and any(map(_is_of_a_person, _MAIL.finditer(text))):
        return "an e-mail address"
    if not any(digit in text for digit in "0123456789"):
        return None
    if any(_is_card(match.group()) for match in _CARD.finditer(text)):
        return "the number of a payment card"
    if any(_is_iban(match.group()) for match in _IBAN.finditer(text)):
        return "the number of a bank account"
    return None


def _is_of_a_person(found: re.Match[str]) -> bool:
    name, domain = found.group(1).lower(), found.group(2).lower()
    return name not in _OFFICES and _SAMPLE_DOMAINS.search(domain) is None


def _is_card(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    if len(set(digits)) < 4:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _is_iban(text: str) -> bool:
    compact = text.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1
