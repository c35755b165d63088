"""Contestant in the environment of clip-retrieval: its ``index`` and its ``back``, on committed embedding shards.

    PYTHON clip_retrieval_back.py EMBEDDINGS FOLDER PORT SITE_PACKAGES

``index`` has its defaults, so autofaiss chooses the index, and tunes its effort to 10 ms a query. ``back`` is served as
its documentation says, by Flask's threaded server, with the index and the metadata in memory. It differs from the
command in two points: no CLIP model is loaded, because the clients send embeddings, and it listens on loopback alone.

The environment of embed.py is enough. A smaller one, without the requirements of clip-retrieval's other commands:

    python3.11 -m venv build/clip-retrieval-back
    build/clip-retrieval-back/bin/pip install --no-deps clip-retrieval==2.45.0
    build/clip-retrieval-back/bin/pip install autofaiss==2.18.0 faiss-cpu==1.15.1 fire==0.5.0 flask==3.1.3 \
        flask-cors==4.0.2 flask-restful==0.3.10 fsspec h5py 'numpy<2' 'pandas<3' pillow prometheus-client \
        'pyarrow<16' 'setuptools<80' tqdm
    CLIP_RETRIEVAL_PYTHON=build/clip-retrieval-back/bin/python make bench NAME=serve

``back`` imports torch for every query. It is imported from SITE_PACKAGES if the environment has none.
"""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path


def main(embeddings: str, folder: Path, port: int) -> None:
    """Build the index unless ``folder`` exists, and serve it."""
    import_commands_alone()
    from clip_retrieval.clip_back import clip_back
    from clip_retrieval.clip_index import clip_index
    from flask import Flask

    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        clip_index(embeddings, str(partial))
        partial.rename(folder)
    indices = folder.with_suffix(".json")
    indices.write_text(json.dumps({"rows": str(folder)}))
    serve = Flask.run
    Flask.run = lambda app, **options: serve(app, **{**options, "host": "127.0.0.1"})
    clip_back(str(indices), port=port, enable_mclip_option=False, provide_aesthetic_embeddings=False)


def import_commands_alone() -> None:
    """Make the modules of clip-retrieval importable without its package, which imports all its commands."""
    package = types.ModuleType("clip_retrieval")
    package.__path__ = importlib.util.find_spec("clip_retrieval").submodule_search_locations
    sys.modules["clip_retrieval"] = package
    loader = types.ModuleType("all_clip")
    loader.load_clip = lambda *_, **__: (None, None, None)
    sys.modules["all_clip"] = loader


if __name__ == "__main__":
    sys.path.append(sys.argv[4])
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
