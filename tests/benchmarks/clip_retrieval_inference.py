"""Contestant in the environment of clip-retrieval: its ``inference`` of the given tars, in rounds.

    {"cores": 2, "batch_size": 64, "decoders": 2, "tars": […], "config": "….json", "weights": "….safetensors", "out": …}

It calls the worker. The command would also measure process start, model loading and its own statistics.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from clip_retrieval.clip_inference.worker import worker
from contestant import serve


def prepare() -> Callable[[], None]:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["cores"])
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    # Its open_clip predates local-dir: names. Register the same architecture, and load the same weights.
    shipped = json.loads(Path(options["config"]).read_text())
    (out / "shipped.json").write_text(json.dumps(shipped["model_cfg"]))
    open_clip.add_model_config(out / "shipped.json")

    def one_round() -> None:
        worker(
            tasks=[0],
            input_dataset=options["tars"],
            output_folder=str(out / "embeddings"),
            output_partition_count=1,
            input_format="webdataset",
            batch_size=options["batch_size"],
            num_prepro_workers=options["decoders"],
            enable_text=False,
            enable_image=True,
            enable_metadata=False,
            wds_image_key="png",
            clip_model=f"open_clip:shipped/{options['weights']}",
            use_jit=False,
        )

    one_round()  # loads the model, which stays loaded
    return one_round


if __name__ == "__main__":
    serve(prepare)
