"""What the site's build needs in addition to its plugins (mkdocs calls these functions by their names).

1. The code on the pages runs in a temporary folder, so that what it saves is not left in the repository, and every model is
   loaded once for all pages.
2. plotly.js is copied out of the installed plotly package, once, and is named by the pages that have a figure.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

PLOTLY = "assets/plotly.min.js"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_undo: list[Any] = []


def on_files(files: Files, config: Any) -> Files:
    import plotly.offline

    script = plotly.offline.get_plotlyjs()
    files.append(File.generated(config, PLOTLY, content=script, inclusion=InclusionLevel.INCLUDED))
    return files


def on_pre_build(config: Any) -> None:
    import mechkit as mk

    on_build_error()  # should an earlier build in this process have been cut off
    here, folder, load = os.getcwd(), tempfile.TemporaryDirectory(), mk.HookedModel.__dict__["from_pretrained"]
    os.chdir(folder.name)
    mk.HookedModel.from_pretrained = functools.cache(mk.HookedModel.from_pretrained)

    def undo() -> None:
        os.chdir(here)
        folder.cleanup()
        mk.HookedModel.from_pretrained = load

    _undo.append(undo)


def on_post_page(output: str, page: Any, config: Any) -> str:
    from mechkit.plot._export import CONFIG

    if "plotly-graph-div" not in output:
        return output
    to_root = "../" * page.url.count("/")
    config_of_figures = json.dumps({"responsive": True, **CONFIG})  # as in the pages that mechkit writes
    output = output.replace('{"responsive": true}', config_of_figures)
    return output.replace("</head>", f'<script src="{to_root}{PLOTLY}"></script>\n</head>', 1)


def on_post_build(config: Any) -> None:
    on_build_error()


def on_build_error(error: Exception | None = None) -> None:
    while _undo:
        _undo.pop()()
