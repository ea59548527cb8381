"""From a store to embeddings: `python examples/five_lines.py STORE OUT.npy`."""

import sys

import numpy as np

from cauc_dist import ContrastiveEncoder, Store

store = Store.open(sys.argv[1])
encoder = ContrastiveEncoder("demo_cauc", epochs=2, batch_size=8, encoder__width=8).fit(store)
h = encoder.transform(store)  # (N, H) float32, in the order of the store
np.save(sys.argv[2], h)
print(f"{len(h)} scans, {h.shape[1]} numbers each; {len(encoder.train_rows_)} of them were trained on")
