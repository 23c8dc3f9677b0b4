"""The parts of README.md that follow from the code: the tree with a role per file, the spec table, the architectures.

python tests/readme_parts.py    writes them into README.md; a house test compares
"""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

from mal.spec import document
from mal.tools import catalog

ROOT = Path(__file__).parents[1]
_WITHOUT_WORDS = {
    "default.safetensors": "The built-in model's weights",
    "default.json": "Its name, the settings it needs, and what was measured of it",
    "quality.json": "The calibration of its masks' quality",
}
SHOWN = ("mal", "jobs", "cluster", "configs", "benchmarks")


def _files() -> list[str]:
    """Files that git tracks, or would, in the folders that are shown."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SHOWN]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in listed if (ROOT / name).is_file()})


def role(path: Path) -> str:
    """What a file is for, from its own first sentence; of files without sentences, from their names."""
    if path.suffix in (".json", ".safetensors"):
        return _WITHOUT_WORDS.get(path.name, "")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".md":
        doc = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
    else:
        comments = [line.lstrip("# ") for line in text.splitlines()[:5] if line.startswith("# ")]
        doc = comments[0] if comments else ""
    first = " ".join(doc.split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".")


def tree() -> str:
    """The tree as text: folders, files, and what each is for."""
    lines: list[str] = []
    shown: set[str] = set()
    for name in _files():
        path = ROOT / name
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder not in shown:
                shown.add(folder)
                package = ROOT / folder / "__init__.py"
                text = role(package) if package.is_file() else ""
                lines.append(f"{'  ' * (depth - 1)}{parts[depth - 1] + '/':<{28 - 2 * (depth - 1)}} {text}".rstrip())
        if parts[-1] == "__init__.py":
            continue
        indent = "  " * (len(parts) - 1)
        lines.append(f"{indent}{parts[-1]:<{28 - len(indent)}} {role(path)}".rstrip())
    return "\n".join(lines)


def parts() -> dict[str, str]:
    """Marker in README.md -> what stands between it and its end."""
    models = catalog.markdown(catalog.describe_models())
    return {"tree": f"```\n{tree()}\n```", "spec": document.markdown(), "models": models}


def filled(readme: str) -> str:
    """``readme`` with the generated parts up to date."""
    for name, text in parts().items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        assert begin in readme, f"README.md has no {begin!r}"
        before, _, rest = readme.partition(begin)
        assert end in rest, f"README.md has no {end!r} behind {begin!r}"
        after = rest.partition(end)[2]
        readme = before + begin + text + end + after
    return readme


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(filled(file.read_text()))
