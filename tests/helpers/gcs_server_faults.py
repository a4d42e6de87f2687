"""What the test server for gs:// does wrong on purpose: one line of text a rule.

A rule is an effect, and words `key=value` that say which requests it is for; without them, for all:

    503                                           every request, for ever
    503 kind=write name=commit_success times=3    the first three writes of a name with 'commit_success' in it
    429 kind=data-write after=2 times=1           the third write by TensorStore
    cut-after kind=delete times=1                 one deletion is done, and its acknowledgement lost
    403 name=^bucket/secret/                      one folder is out of bounds
    exit-after kind=media after=5                 the server's process ends after the sixth

Effects:
    STATUS                      an error answer, one of STATUSES; nothing is done
    cut-before, cut-after       the connection is closed before or after the request is acted on
    hang-before, hang-after     the same, but the connection stays open and silent until the server is stopped
    exit-before, exit-after     the same, but the whole process ends
    truncate:N                  only the first N bytes of the body are sent, then the connection is closed
    delay:S                     the answer comes S seconds late
    drip:N                      the body comes at N bytes per second

Words:
    kind=K[,K...]    see KINDS and GROUPS
    method=M         GET, POST, ...
    name=REGEX       searched for in 'bucket/object'; in 'bucket/prefix' of a list, 'bucket' of a bucket
    client=REGEX     searched for in the client's name: see `gcs_server.environment`
    after=N          the first N matches are spared; times=M: then M are hit, and no more

Each rule counts its own matches. Of several that would act on a request, the first does.
"""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

KINDS = frozenset(
    {
        *("bucket", "list", "stat", "read", "patch", "delete", "copy", "move", "compose", "batch", "other"),
        *("media", "multipart", "resumable", "chunk", "cancel"),
    }
)
"""Kinds of requests: `media` and `multipart` write an object at once, `resumable` and `chunk` in several requests."""

GROUPS = {
    "write": frozenset({"media", "multipart", "resumable", "chunk"}),
    "data-write": frozenset({"media"}),  # TensorStore's
    "metadata-write": frozenset({"multipart", "resumable", "chunk"}),  # gcsfs'
}

STATUSES = frozenset({400, 401, 403, 404, 408, 410, 412, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Effect:
    """What happens instead of a good answer. `before`: the request is not acted on."""

    what: str
    before: bool = False
    amount: float = 0

    @classmethod
    def parse(cls, text: str) -> Effect:
        if text.isdigit() and int(text) in STATUSES:
            return cls("status", True, int(text))
        if found := re.fullmatch(r"(cut|hang|exit)-(before|after)", text):
            return cls(found[1], found[2] == "before")
        if found := re.fullmatch(r"(truncate|delay|drip):(\d+(?:\.\d+)?)", text):
            return cls(found[1], False, float(found[2]))
        raise ValueError(f"{text!r} is no effect")


@dataclass
class Rule:
    """One line of text, and how often it applied."""

    text: str
    effect: Effect
    kinds: frozenset[str] = KINDS
    method: str | None = None
    name: re.Pattern[str] = re.compile("")
    client: re.Pattern[str] = re.compile("")
    after: int = 0
    times: int | None = None
    matches: int = field(default=0, init=False)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Raises ValueError where the text is none."""
        effect, *words = shlex.split(text)
        rule = cls(text, Effect.parse(effect))
        for word in words:
            key, separator, value = word.partition("=")
            if not separator:
                raise ValueError(f"{word!r} in the rule {text!r} is no key=value")
            if key == "kind":
                rule.kinds = frozenset().union(*(GROUPS.get(kind, {kind}) for kind in value.split(",")))
                if wrong := rule.kinds - KINDS:
                    raise ValueError(f"{', '.join(sorted(wrong))} in the rule {text!r} is no kind of request")
            elif key == "method":
                rule.method = value
            elif key == "name":
                rule.name = re.compile(value)
            elif key == "client":
                rule.client = re.compile(value)
            elif key == "after":
                rule.after = int(value)
            elif key == "times":
                rule.times = int(value)
            else:
                raise ValueError(f"{key!r} in the rule {text!r} is unknown")
        return rule

    def is_for(self, kind: str, method: str, name: str, client: str) -> bool:
        return (
            kind in self.kinds
            and self.method in (None, method)
            and self.name.search(name) is not None
            and self.client.search(client) is not None
        )

    def acts_now(self) -> bool:
        """Count a match: is it one of those that are hit?"""
        self.matches += 1
        return self.after < self.matches and (self.times is None or self.matches <= self.after + self.times)


class Faults:
    """The rules in force, in order."""

    def __init__(self, rules: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self.add(*rules)

    def add(self, *rules: str) -> None:
        parsed = [Rule.parse(rule) for rule in rules]
        with self._lock:
            self._rules += parsed

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def matches(self) -> dict[str, int]:
        """How many requests each rule was for."""
        with self._lock:
            return {rule.text: rule.matches for rule in self._rules}

    def effect(self, kind: str, method: str, name: str, client: str) -> Effect | None:
        """What is to happen to this request, which is counted."""
        with self._lock:
            hit = [rule for rule in self._rules if rule.is_for(kind, method, name, client) and rule.acts_now()]
        return hit[0].effect if hit else None
