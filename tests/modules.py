#!/usr/bin/env python3
"""Prints the graph of a crate's modules, and its circles.

    python3 tests/modules.py [FOLDER ...]        # with a lib.rs or main.rs; pipeline/src and model/src by default

At each level, from the crate down, a line per module says which siblings it uses; everything below a module counts as
part of it. A circle is a set of siblings each of which uses all others, directly or indirectly. If there is one, the
exit code is 1. A module and its own children are not a circle. Tests (`#[cfg(test)]`) are left out. Uses are paths that
begin with `crate`, `super`, `self` or a child's name; a name that a module re-exports with `use` counts for its origin.
"""

import re
import sys
from pathlib import Path

TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)
      | (?P<block>/\*)
      | (?P<raw>b?c?r(?P<hashes>\#*)"(?s:.*?)"(?P=hashes))
      | (?P<string>[bc]?"(?:\\(?s:.)|[^"\\])*")
      | (?P<char>b?'(?:\\(?:x..|u\{[^}]*\}|.)|[^'\\])')
      | (?P<word>(?:r\#)?[^\W\d]\w*|'\w+|\d\w*)
      | (?P<mark>::|(?s:.))""",
    re.VERBOSE,
)
OPEN = {"{": "}", "(": ")", "[": "]"}


def tokens(text):
    """(token, line) pairs of Rust source, without comments. Only plain strings are kept, for `#[path = "…"]`."""
    found, at, line = [], 0, 1
    while at < len(text):
        match = TOKEN.match(text, at)
        end = match.end()
        if match["block"]:
            depth = 1
            while depth and (mark := re.compile(r"/\*|\*/").search(text, end)):
                depth += 1 if mark[0] == "/*" else -1
                end = mark.end()
            end = len(text) if depth else end
        elif match.lastgroup in ("string", "word", "mark"):
            found.append((match[0].removeprefix("r#"), line))
        line += text.count("\n", at, end)
        at = end
    return found


def closing(code, at):
    """The index of the bracket that closes the bracket at `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i][0] in OPEN) - (code[i][0] in OPEN.values())
        if not depth:
            return i
    return len(code) - 1


def item_end(code, at):
    """The index after the item that begins at `at`: after its `;` or its braces."""
    while at < len(code):
        if code[at][0] in OPEN:
            last = closing(code, at)
            if code[at][0] == "{":
                return last + (2 if [token for token, _ in code[last + 1 : last + 2]] == [";"] else 1)
            at = last
        elif code[at][0] == ";":
            return at + 1
        at += 1
    return at


class Crate:
    def __init__(self, folder):
        self.modules = {()}
        self.names = {}  # (module, name) -> the path that a `use` gives it
        self.uses = []  # (module, path, place)
        root = next(root for name in ("lib.rs", "main.rs") if (root := folder / name).is_file())
        self.read(root, (), folder)

    def read(self, file, module, folder):
        self.walk(tokens(file.read_text()), module, folder, file)

    def walk(self, code, module, folder, file):
        """Reads a module's tokens. `folder` holds the files of its children."""
        at, is_test, path = 0, False, None
        while at < len(code):
            token = code[at][0]
            if token == "#" and code[at + 1][0] == "[":
                last = closing(code, at + 1)
                inside = [t for t, _ in code[at + 2 : last]]
                if inside[:1] == ["cfg"] and "test" in inside and "not" not in inside:
                    is_test = True
                if inside[:2] == ["path", "="]:
                    path = inside[2].strip('"')
                at = last + 1
                continue
            if is_test:
                at, is_test, path = item_end(code, at), False, None
                continue
            if token == "mod" and at + 2 < len(code) and code[at + 2][0] in ";{":
                name, child = code[at + 1][0], (*module, code[at + 1][0])
                self.modules.add(child)
                if code[at + 2][0] == "{":
                    last = closing(code, at + 2)
                    self.walk(code[at + 3 : last], child, folder / name, file)
                    at = last + 1
                else:
                    places = [folder / f"{name}.rs", folder / name / "mod.rs"]
                    if path:
                        places = [file.parent / path]
                    place = next(place for place in places if place.is_file())
                    self.read(place, child, folder / name)
                    at += 3
                path = None
                continue
            if token == "use":
                at = self.tree(code, at + 1, (), module, file)
            elif token in ("crate", "super", "self") and at + 1 < len(code) and code[at + 1][0] == "::":
                names, line = [token], code[at][1]
                while at + 2 < len(code) and code[at + 1][0] == "::" and re.match(r"\w", code[at + 2][0]):
                    names.append(code[at + 2][0])
                    at += 2
                self.uses.append((module, tuple(names), f"{file}:{line}"))
                at += 1
            else:
                at += 1
            path = path if token in ("pub", "(", ")", "crate", "super", "in") else None

    def tree(self, code, at, prefix, module, file):
        """Reads the tree of a `use` from `at`, with nested braces, and returns the index of its end."""
        names = list(prefix)
        while at < len(code):
            token, line = code[at]
            if token == "{":
                at += 1
                while code[at][0] != "}":
                    at = self.tree(code, at, tuple(names), module, file)
                    at += code[at][0] == ","
                return at + 1
            if token in (",", ";", "}", "as"):
                break
            if token != "::":
                names.append(token)
            at += 1
        else:
            return at
        # `a::{self}` is `a`, and `a::*` is everything in it
        path = tuple(names[:-1]) if names[-1] in ("self", "*") and len(names) > 1 else tuple(names)
        bound = path[-1]
        if code[at][0] == "as":
            bound, at = code[at + 1][0], at + 2
        if names[-1] != "*":
            self.names.setdefault((module, bound), path)
        self.uses.append((module, path, f"{file}:{line}"))
        return at

    def resolve(self, module, path, seen=()):
        """The module that a path written in `module` leads to; None if it belongs to another crate."""
        at, rest = module, list(path)
        if rest[0] == "crate":
            at, rest = (), rest[1:]
        elif rest[0] == "self":
            rest = rest[1:]
        elif rest[0] != "super" and (*module, rest[0]) not in self.modules:
            name = (module, rest[0])
            if name in seen or name not in self.names:
                return None
            return self.resolve(module, (*self.names[name], *rest[1:]), (*seen, name))
        while rest and rest[0] == "super":
            at, rest = at[:-1], rest[1:]
        while rest:
            if (*at, rest[0]) in self.modules:
                at, rest = (*at, rest[0]), rest[1:]
                continue
            name = (at, rest[0])
            if name in seen or name not in self.names:
                return at
            further = self.resolve(at, (*self.names[name], *rest[1:]), (*seen, name))
            return at if further is None else further
        return at

    def levels(self):
        """For each module with children: which children use which, and where."""
        levels = {}
        for module, path, place in self.uses:
            target = self.resolve(module, path)
            if target is None:
                continue
            common = next((i for i, (a, b) in enumerate(zip(module, target)) if a != b), None)
            if common is not None:
                level = levels.setdefault(module[:common], {})
                level.setdefault(module[common], {}).setdefault(target[common], place)
        return dict(sorted(levels.items()))


def circles(graph):
    """The strongly connected components with more than one member."""

    def reached(start):
        found, open_ = set(), [start]
        while open_:
            new = set(graph.get(open_.pop(), ())) - found
            found |= new
            open_ += new
        return found

    reach = {node: reached(node) for node in graph}
    found = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in graph}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def main(folders):
    is_round = False
    for folder in folders:
        for level, graph in Crate(Path(folder)).levels().items():
            print("::".join((folder, *level)))
            for module in sorted(graph):
                print(f"    {module} -> {', '.join(sorted(graph[module]))}")
            for circle in circles(graph):
                is_round = True
                print(f"    CIRCLE of {', '.join(circle)}")
                for a in circle:
                    for b in sorted(set(graph[a]) & set(circle)):
                        print(f"        {a} -> {b}  {graph[a][b]}")
    return int(is_round)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["pipeline/src", "model/src"]))
