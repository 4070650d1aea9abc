"""What frameworks need to drive an optimizer whose step takes a closure: a module for each, importing it when used.

Most need nothing: see docs/frameworks.md, which lists them with the shortest program for each. There are modules for
those that call ``step()`` without a closure (:mod:`~imstep.integrations.transformers`,
:mod:`~imstep.integrations.ignite`), that want an optimizer of a class of theirs
(:mod:`~imstep.integrations.scimba`, :mod:`~imstep.integrations.pina`), or that log or accumulate in the loop
(:mod:`~imstep.integrations.lightning`, :mod:`~imstep.integrations.accelerate`). None of them computes anything.
"""
