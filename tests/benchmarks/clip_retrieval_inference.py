"""A contestant in clip-retrieval's own environment: its ``inference`` of the tars it was given, round after round.

    {"cores": 2, "batch_size": 64, "decoders": 2, "tars": […], "config": "….json", "weights": "….safetensors", "out": …}

Its worker is called, not its command: that would also start, load the model and wait for its own statistics.
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
    # Its open_clip is of before local-dir: names; the same architecture under a name of ours, the same weights.
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

    one_round()  # loads the model, which it then keeps
    return one_round


if __name__ == "__main__":
    serve(prepare)
