"""A hook of mkdocs: pages may link to files of the repository outside docs/, which are copied into the site.

A page links to `../benchmarks/results/digits/scores.png` as it would on GitHub. The file then becomes a part of the site, under
`files/benchmarks/results/digits/scores.png`, and the link is changed accordingly, so that the repository needs no second copy.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def _path_in_repository(link, page):
    """The path of the linked file relative to the root of the repository; None for a file inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files, config):
    """Adds every file outside docs/ that a page links to."""
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            path = _path_in_repository(link, page.src_uri)
            if path is not None and files.get_file_from_path(f"files/{path}") is None:
                files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Changes the links to these files."""
    folder = posixpath.dirname(page.file.src_uri)

    def changed(match):
        path = _path_in_repository(match[0], page.file.src_uri)
        return match[0] if path is None else posixpath.relpath(f"files/{path}", folder or ".")

    return LINK.sub(changed, markdown)
