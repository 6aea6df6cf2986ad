"""Whatever the server answers to is fuzzed by the soak."""

import ast
import re

from kit.pack import ROOT

ROUTE = re.compile(r'\.routes\.(?:get|post|put|delete|patch|head)\("/([^"]+)"\)')


def test_every_route_is_fuzzed():
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "nodes").rglob("*.py")))
    fuzz = ast.parse((ROOT / "tests" / "soak" / "fuzz.py").read_text(encoding="utf-8"))
    names = {node.value for node in ast.walk(fuzz) if isinstance(node, ast.Constant)}
    routes = set(ROUTE.findall(code))
    assert len(routes) == len(set(re.findall(r'"(/spillway/\w+)"', code))) > 4, "a route is added in another way"
    assert routes <= names
