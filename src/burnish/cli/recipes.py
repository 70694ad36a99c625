"""`burnish recipes`"""

from __future__ import annotations

from burnish.recipe import schema, shipped, shipped_text


def recipes_command(name: str | None, print_schema: bool) -> None:
    if print_schema:
        print(schema())
    elif name is not None:
        print(shipped_text(name), end="")
    else:
        for each in shipped():
            first = shipped_text(each).splitlines()[0].removeprefix("#").strip()
            print(f"{each:22} {first}")
