"""Every sentence that decisions and notices of ledgers can be, found in the code of the pack without running it.

What cannot be known, such as a size or a name, is a HOLE in it.
"""

import ast
import re
from itertools import product

FOLDERS = ("ops", "patcher", "cache", "nodes")
HOLE = "\0"
# What is called with a text that a user reads, as it is written there.
SAYERS = (r"ledger\.decide", r"ledger\.decide_once", r"ledger\.notice", r"state\.say", r"state\.notes\.append")
# Fields with a text, and of what they are read; "" for whatever has one.
TOLD_IN = {"reason": "", "name": "limit of ProcessLimit"}
SHOWN = 8  # sentences of a part that are put into the whole: the others are looked at by themselves
MOST = 2000  # sentences of one expression
DEEPEST = 36
EMPTY = re.compile(r"\. (\.|$)")  # a sentence that is added only where there is one
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


class Code:
    """The pack's code, as far as sentences need it."""

    def __init__(self, root):
        self.functions, self.calls, self.raised, self.constants, self.parts = {}, {}, {}, {}, {}
        self.scopes, self.classes, self.owners, self.files, self.above, self.below = {}, {}, {}, {}, {}, {}
        for folder in FOLDERS:
            for path in sorted((root / folder).rglob("*.py")):
                self._read(ast.parse(path.read_text(encoding="utf-8")), path)

    def _read(self, tree, path):
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._constants(node.targets[0], node.value)
        self._walk(tree, None, path)

    def _all(self, node):
        """Every node below one, listed once."""
        if node not in self.below:
            self.below[node] = list(ast.walk(node))
        return self.below[node]

    def _constants(self, target, value):
        if isinstance(target, ast.Name):
            self.constants.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, given in zip(target.elts, value.elts, strict=True):
                self._constants(one, given)

    def _walk(self, node, scope, path):
        for child in ast.iter_child_nodes(node):
            self.scopes[child], self.files[child] = scope, path
            self.above[child] = node
            if isinstance(child, FUNCTIONS):
                self.functions.setdefault(child.name, []).append(child)
                if isinstance(node, ast.ClassDef):
                    self.owners[child] = node
            elif isinstance(child, ast.Call):
                self.calls.setdefault(name_of(child.func), []).append(child)
            elif isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
                self.raised.setdefault(name_of(child.exc.func), []).append(child.exc)
            if isinstance(child, ast.ClassDef):
                self.classes.setdefault(child.name, []).append(child)
            self._walk(child, child if isinstance(child, FUNCTIONS) else scope, path)

    # -- what an expression can be

    def sentences(self, node, seen=()):
        """List what the text of an expression can be."""
        if len(seen) > DEEPEST or node in seen:
            return [HOLE]
        found = [re.sub(f"{HOLE}+", HOLE, text) for text in self._sentences(node, (*seen, node))]
        return list(dict.fromkeys(found))[:MOST]

    def each(self, nodes, seen):
        """List what the texts of several expressions can be."""
        return [text for node in nodes for text in self.sentences(node, seen)]

    def _sentences(self, node, seen):
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return self._joined(parts, seen)
            case ast.FormattedValue(value=value, format_spec=None):
                return self.sentences(value, seen)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined([left, right], seen)
            case ast.BinOp(left=ast.Constant(value=str(text)), op=ast.Mult()):
                return ["", text]
            case ast.IfExp(body=body, orelse=other):
                return self.sentences(body, seen) + self.sentences(other, seen)
            case ast.BoolOp(values=values):
                return self.each(values, seen)
            case ast.Name():
                return self._name(node, seen)
            case ast.Subscript(value=ast.Name(id=name)) if name in self.constants:
                tables = [one for one in self.constants[name] if isinstance(one, ast.Dict)]
                return self.each([one for table in tables for one in table.values], seen) or [HOLE]
            case ast.Subscript(value=value):  # the beginning of a text
                return self.sentences(value, seen) if isinstance(value, ast.Call) else [HOLE]
            case ast.Attribute():
                return self._attribute(node, seen)
            case ast.Call():
                return self._call(node, seen)
        return [HOLE]

    def _joined(self, parts, seen):
        """Join parts, with every choice of single words, and of those parts that are sentences one after the other."""
        choices = [self.sentences(part, seen) for part in parts]
        words = [one if all(" " not in text.strip() for text in one) else one[:1] for one in choices]
        found = ["".join(chosen) for chosen, _ in zip(product(*words), range(MOST), strict=False)]
        for place, one in enumerate(choices):
            before, after = ("".join(some[0] for some in choices[a:b]) for a, b in ((0, place), (place + 1, None)))
            found += [before + text + after for text in one[:SHOWN]]
            self.parts.update(dict.fromkeys(one[SHOWN:]))
        return found

    def _name(self, node, seen):
        scope = self.scopes.get(node)
        if scope is None:
            values = self.constants.get(node.id, [])
            return self.each(values, seen) or [HOLE]
        found = []
        for inner in self._all(scope):
            match inner:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        texts = self._assigned(target, value, node.id, seen)
                        found += self._with_more(scope, inner, texts, node.id, seen)
                case ast.For(target=ast.Tuple() as target, iter=ast.Tuple(elts=rows)):
                    for row in rows:
                        found += self._assigned(target, row, node.id, seen)
                case ast.For(target=ast.Name(id=node.id), iter=ast.Name(id=items)):
                    found += self._items(scope, items, seen)
                case ast.ExceptHandler(name=node.id, type=ast.Name(id=kind)) if kind in self.classes:
                    raised = [one.args[0] for one in self.raised.get(kind, []) if one.args]
                    found += self.each(raised, seen) or [HOLE]
        names = [argument.arg for argument in [*scope.args.args, *scope.args.kwonlyargs]]
        if node.id in names:
            found += self._given(scope, node.id, names, seen)
        elif not found:
            values = self.constants.get(node.id, [])
            found = self.each(values, seen)
        return found or [HOLE]

    def _with_more(self, scope, assigned, found, name, seen):
        """Texts with what is added to them until the next is assigned. What only some add may be missing."""
        others = [one for one in self._all(scope) if isinstance(one, ast.Assign)]
        lines = [one.lineno for one in others if name in map(name_of, one.targets)]
        last = min((line for line in lines if line > assigned.lineno), default=1 << 30)
        for one in self._all(scope) if found else ():
            if isinstance(one, ast.AugAssign) and name_of(one.target) == name and assigned.lineno < one.lineno < last:
                texts = self.sentences(one.value, seen)
                texts = texts if self.above[one] is self.above[assigned] else ["", *texts]
                found = [before + text for before in found for text in texts]
        return found

    def _assigned(self, target, value, name, seen):
        if isinstance(target, ast.Name) and target.id == name:
            return self.sentences(value, seen)
        if isinstance(target, ast.Tuple):
            places = [i for i, one in enumerate(target.elts) if isinstance(one, ast.Name) and one.id == name]
            if not places:
                return []
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                return self.sentences(value.elts[places[0]], seen)
            if isinstance(value, ast.Call):
                return self._returned(value, seen, places[0])
            return [HOLE]
        return []

    def _items(self, scope, name, seen):
        """What a list that a function makes, or has from another that appends to its own, can hold."""
        scopes = [scope]
        for inner in self._all(scope):
            if isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Call):
                scopes += self.functions.get(name_of(inner.value.func), [])
        appended = [
            call.args[0]
            for one in scopes
            for call in self._all(one)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{name}.append"
        ]
        return self.each(appended, seen) or [HOLE]

    def _given(self, function, name, names, seen):
        """What callers give for a parameter, and what it is where they give none."""
        owner, found = self.owners.get(function), []
        place = names.index(name) - (owner is not None)
        makes = owner is not None and function.name == "__init__"
        calls = self.calls.get(owner.name if makes else function.name, [])
        for call in calls if makes else [one for one in calls if self._may_call(one, function)]:
            given = next((one.value for one in call.keywords if one.arg == name), None)
            if given is None and 0 <= place < len(call.args):
                given = call.args[place]
            if given is not None:
                found += self.sentences(given, seen)
        defaults = dict(zip(reversed(function.args.args), reversed(function.args.defaults), strict=False))
        defaults |= dict(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True))
        found += self.each([value for one, value in defaults.items() if one.arg == name and value], seen)
        return found or [HOLE]

    def _attribute(self, node, seen):
        """What a property says, or what is given for a field of that name when something is made."""
        found, receiver = [], name_of(node.value).lower()
        for made in self.constants.get(name_of(node.value), []) if node.attr == "name" else ():
            found += self.sentences(made.args[0], seen) if isinstance(made, ast.Call) else []
        inside = self.owners.get(self.scopes.get(node)) if receiver == "self" else None
        for owner in (owner for owners in self.classes.values() for owner in owners):
            for one in owner.body:
                is_its = inside is owner or receiver == owner.name.lower()
                if isinstance(one, FUNCTIONS) and one.name == node.attr and is_its:
                    found += self._returns(one, seen)
            fields = [one.target.id for one in owner.body if isinstance(one, ast.AnnAssign)]
            told = node.attr in TOLD_IN and TOLD_IN[node.attr] in ("", f"{receiver} of {owner.name}")
            if node.attr in fields and (inside is owner or told):
                found += self.each(self._fields(owner.name, node.attr, fields.index(node.attr)), seen)
        if inside is not None and not found:
            found = self.each(self._set(inside, node.attr), seen)
        return found or [HOLE]

    def _fields(self, owner, name, place):
        """What is given for a field when one of a class is made."""
        for call in self.calls.get(owner, []):
            given = [one.value for one in call.keywords if one.arg == name]
            if len(call.args) > place and not any(isinstance(one, ast.Starred) for one in call.args):
                given.append(call.args[place])
            yield from (one for one in given if not (isinstance(one, ast.Constant) and one.value == ""))

    def _set(self, owner, name):
        """What a class's `__init__` sets an attribute to."""
        for init in (one for one in owner.body if isinstance(one, FUNCTIONS) and one.name == "__init__"):
            for one in self._all(init):
                if isinstance(one, ast.Assign):
                    yield from (value for target in one.targets for value in self._pair(target, one.value, name))

    def _pair(self, target, value, name):
        if isinstance(target, ast.Attribute) and target.attr == name:
            yield value
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, given in zip(target.elts, value.elts, strict=True):
                yield from self._pair(one, given, name)

    def _call(self, node, seen):
        match node.func:
            case ast.Attribute(value=ast.Constant(value=str()), attr="join"):
                each = node.args[0]
                return ["", *self.sentences(each.elt, seen)] if isinstance(each, ast.GeneratorExp) else [HOLE]
            case ast.Name(id="in_words") | ast.Name(id="str") | ast.Name(id="first_line"):
                return [HOLE]
        return self._returned(node, seen)

    def _returned(self, call, seen, place=None):
        name = name_of(call.func)
        functions = [one for one in self.functions.get(name, []) if self._may_call(call, one)]
        found = [text for function in functions for text in self._returns(function, seen, place)]
        return found or [HOLE]

    def _may_call(self, call, function):
        """Say whether a call may be of a function. Of a method where what it is called on has its class's name."""
        owner = self.owners.get(function)
        if not isinstance(call.func, ast.Attribute):
            return owner is None
        receiver = name_of(call.func.value).strip("_").lower()
        if owner is None:
            return self.files[function].stem == receiver != "ledger"
        inside = self.owners.get(self.scopes.get(call)) if receiver == "self" else None
        above = [one.id for one in owner.bases if isinstance(one, ast.Name)]
        if inside is owner or (inside is not None and inside.name in above):
            return True
        return owner.name.lower().endswith(receiver) or len(self.functions[function.name]) == 1

    def _returns(self, function, seen, place=None):
        found = []
        for inner in self._all(function):
            if isinstance(inner, ast.Return) and inner.value is not None and self.scopes[inner] is function:
                values = [inner.value]
                if isinstance(inner.value, ast.IfExp):
                    values = [inner.value.body, inner.value.orelse]
                for value in values:
                    if place is not None:
                        value = value.elts[place] if isinstance(value, ast.Tuple) else None
                    if value is not None and not (isinstance(value, ast.Constant) and not isinstance(value.value, str)):
                        found += self.sentences(value, seen)
        return found


def name_of(node):
    """The last part of a name, or of what is called."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def said(root):
    """Every sentence of the pack's ledgers -> {sentence with holes: where it is said}."""
    code = Code(root)
    found = {}
    for calls in code.calls.values():
        for call in calls:
            if call.args and any(re.search(rf"\b{sayer}$", ast.unparse(call.func)) for sayer in SAYERS):
                place = f"{code.files[call].relative_to(root)}:{call.lineno}"
                given = call.args[0].elts[0] if isinstance(call.args[0], ast.Tuple) else call.args[0]
                for text in code.sentences(given):
                    found.setdefault(text, place)
    found |= {text: "part of another" for text in code.parts if text[:1].isalnum() or text[:1] == HOLE}
    return {text: place for text, place in found.items() if text and not EMPTY.search(text)}
