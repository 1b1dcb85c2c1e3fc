"""Serve ONNX Runtime with Triton's batcher.

Arguments: NAME MODEL.onnx PORT THREADS CONTEXTS MAX_BATCH.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

if __name__ == "__main__":
    name, path, port, threads, contexts, max_batch = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()

    @batch  # type: ignore[untyped-decorator]
    def infer(**inputs: Any) -> list[Any]:
        outputs: list[Any] = session.run([logits.name], {image.name: inputs[image.name]})
        return outputs

    config = TritonConfig(http_address="127.0.0.1", http_port=int(port), allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=name,
            infer_func=[infer] * int(contexts),
            inputs=[Tensor(name=image.name, dtype=np.float32, shape=tuple(image.shape[1:]))],
            outputs=[Tensor(name=logits.name, dtype=np.float32, shape=tuple(logits.shape[1:]))],
            config=ModelConfig(
                max_batch_size=int(max_batch) or 4,
                batcher=DynamicBatcher(max_queue_delay_microseconds=0),
            ),
        )
        triton.serve()
