"""The Python in the documents, as code objects."""

import ast
import re
from pathlib import Path
from types import CodeType
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"


class Block(NamedTuple):
    """A block of Python: the heading above it, its first line's number in the document, and its text."""

    page: Path
    heading: str
    line: int
    text: str

    def compiled(self) -> CodeType:
        """Its lines are numbered as in the document. Raises SyntaxError."""
        text = "\n" * (self.line - 1) + self.text
        code: CodeType = compile(text, str(self.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        return code


def blocks_of(page: Path) -> list[Block]:
    document = page.read_text()
    blocks = []
    for match in re.finditer(r"^```python\n(.*?)^```", document, re.DOTALL | re.MULTILINE):
        above = document[: match.start(1)]
        heading = re.findall(r"^#+ (.*)$", above, re.MULTILINE)[-1]
        blocks.append(Block(page, heading, above.count("\n") + 1, match[1]))
    return blocks
