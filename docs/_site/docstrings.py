"""What docstrings say, in the words of the tool that sets the reference.

Our docstrings are written for people and for doctest: ``Example:`` stands over an example; ``Source:``, ``Cost:`` and
other headings begin a paragraph where text follows on their line; arguments may share an entry; names are marked by
Sphinx's roles. mkdocstrings wants ``Examples:``, sections and Markdown links. This extension of its collector
translates, so that no docstring has to.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Alias, AliasResolutionError, CyclicAliasError, Docstring, Extension, Module

REFERENCE = Path(__file__).resolve().parents[1]

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|obj|exc):`(~?)([^`]+)`")
_PARAGRAPH = re.compile(r"^( *)(Source|Cost|Args|Attributes|Returns|Raises): +(\S.*(?:\n\1 +\S.*)*)$", re.MULTILINE)
_HEADING = re.compile(r"^( *)Example:$", re.MULTILINE)
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +\S.*)*)$", re.MULTILINE)
_CODE = re.compile(r"``([^`]+)``")


def documented() -> dict[str, str]:
    """Last part of a name, and the whole of it -> where the reference documents it."""
    found: dict[str, str] = {}
    for page in sorted(REFERENCE.glob("reference*.md")):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = name
            found.setdefault(name.rsplit(".", 1)[-1], name)
    return found


def link(name: str, targets: dict[str, str], shorten: bool = False) -> str:
    """A link to what the reference documents, a method of it included; else the name as code."""
    shown = f"`{name.rsplit('.', 1)[-1] if shorten else name}`"
    owner, _, member = name.rpartition(".")
    if name in targets:
        return f"[{shown}][{targets[name]}]"
    if owner in targets and member:
        return f"[{shown}][{targets[owner]}.{member}]"
    return shown


def translated(text: str, targets: dict[str, str]) -> str:
    """The docstring in Markdown, with the headings that the tool knows."""
    text = _HEADING.sub(r"\1Examples:", text)
    text = _SHARED.sub(lambda m: "\n".join(f"{m[1]}{name}{m[3]}" for name in m[2].split(", ")), text)
    text = _PARAGRAPH.sub(lambda m: f"{m[1]}**{m[2]}.** " + re.sub(r"\n +", "\n" + m[1], m[3]), text)
    text = _ROLE.sub(lambda m: link(m[2], targets, shorten=bool(m[1])), text)
    return _CODE.sub(r"`\1`", text)


class Translation(Extension):
    """Translates every docstring of a package once it has been collected."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Called by the collector, before it writes."""
        self._walk(pkg, documented())
        modules = list(_modules(pkg))
        for module in modules:
            _resolve(module)
        for module in modules:
            _uncover(module)

    def _walk(self, obj: Any, targets: dict[str, str]) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = translated(obj.docstring.value, targets)
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member, targets)


def _modules(module: Module) -> Iterator[Module]:
    yield module
    for member in module.modules.values():
        if not member.is_alias:
            yield from _modules(member)


def _resolve(module: Module) -> None:
    """Let imported names find what they stand for while every module is still to be found."""
    for member in module.members.values():
        if member.is_alias:
            with contextlib.suppress(AliasResolutionError, CyclicAliasError):
                member.resolve_target()


def _uncover(package: Module) -> None:
    """A function that bears the name of its module, as `lanczos` does: the package's name means the function."""
    for name, inner in list(package.modules.items()):
        if not inner.is_alias and name in inner.members and name in (package.exports or ()):
            package.members[name] = Alias(name, inner.members[name], parent=package)
