"""The README as a package index shows it: links to files of the repository are absolute. Hatch runs this to build.

In the repository they are relative, so that they work in a clone, in a fork and on any branch.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# [text](target) and ![text](target), of targets that are neither absolute nor a place on the page.
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|#|mailto:)([^)\s]+)\)")


def absolute(text: str, source: str, ref: str) -> str:
    """``text`` with links to files below ``source``, the repository's address, at the tag or branch ``ref``."""
    source = source.rstrip("/")

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        path = target.partition("#")[0]
        if not (ROOT / path).exists():
            raise ValueError(f"README.md links to {target}, which is not there")
        kind = "raw" if mark else "tree" if (ROOT / path).is_dir() else "blob"
        return f"{mark}{label}({source}/{kind}/{ref}/{target.rstrip('/')})"

    # Code is left as it is: a[i](x) is no link.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # the tests need the function only
    pass
else:

    class ReadmeHook(MetadataHookInterface):
        """Fills in ``project.readme``."""

        def update(self, metadata: dict) -> None:
            version = re.search(r'__version__ = "(.+?)"', (ROOT / "mixjax" / "__init__.py").read_text("utf-8"))[1]
            text = absolute((ROOT / "README.md").read_text("utf-8"), metadata["urls"]["Source"], f"v{version}")
            metadata["readme"] = {"content-type": "text/markdown", "text": text}
