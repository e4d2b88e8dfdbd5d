"""MkDocs' hook: pages of results/ are part of the site, and links to them lead to the site's.

So every link in the sources is one between files of the repository, and can be followed there too.
"""

import re
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

# Where the site has each.
PAGES = {
    "results/study/README.md": "results/study.md",
    "results/study/tables.md": "results/study-tables.md",
    "results/study/choosing.md": "results/study-choosing.md",
    "results/benchmark/README.md": "results/benchmark.md",
    "results/lm/README.md": "results/language-model.md",
    "results/reliability.md": "results/reliability.md",
}
PICTURES = ("results/study/curves.png", "results/benchmark/cpu-growth.png", "results/lm/rank_curve.png")
LINK = re.compile(r"(\]\()([^)#\s]+)")


def on_files(files, config):
    root = Path(config.config_file_path).parent
    pictures = {source: f"results/{PurePosixPath(source).name}" for source in PICTURES}
    for source, place in {**PAGES, **pictures}.items():
        files.append(File.generated(config, place, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    place = PurePosixPath(page.file.src_uri)
    sources = {place: source for source, place in PAGES.items()}
    source = PurePosixPath(sources.get(str(place), f"docs/{place}"))

    def to_the_site(link: re.Match) -> str:
        target = PAGES.get(normpath(source.parent / link[2]))
        return link[1] + (relpath(target, place.parent) if target else link[2])

    return LINK.sub(to_the_site, markdown)
