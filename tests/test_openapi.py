"""The contract names every route of the service, and no other."""

from pathlib import Path
from typing import Any

from starlette.routing import Route

from logitstore.service.access import Access
from logitstore.service.app import create_app
from logitstore.service.openapi import openapi
from logitstore.service.shelf import Shelf


def test_every_route_is_in_the_contract_and_no_other(tmp_path: Path) -> None:
    routes: Any = create_app(Shelf([tmp_path]), None, Access(None)).routes
    assert all(isinstance(route, Route) for route in routes)
    served = {(route.path.replace(":path", ""), method) for route in routes for method in route.methods}
    said = {
        (path, method.upper()) for path, item in openapi()["paths"].items() for method in item if method != "parameters"
    }
    assert said <= served and {method for _, method in served - said} == {"HEAD"}  # which each GET answers
