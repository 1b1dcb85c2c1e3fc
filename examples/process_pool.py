"""Classify many images with several processes, one model each.

python examples/process_pool.py model.onnx photos/*.jpg
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import runtime

session: runtime.Session


def load(model: str) -> None:
    global session
    session = runtime.load(model, threads=1)


def classify(image: str) -> tuple[str, str, float]:
    (best,) = session.predict([image])
    return image, best.label, best.probability


if __name__ == "__main__":
    model, *images = sys.argv[1:]
    # spawn, because threads of a loaded model do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=load, initargs=(model,)) as pool:
        for image, label, probability in pool.map(classify, images, chunksize=16):
            print(f"{image}  {label}  {probability:.1%}")
