"The process that trains: SAMPLE HARD OUT. Saves the bundle and, before it is ever loaded again, what it says of HARD."
import sys
from pathlib import Path

import numpy as np

from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.bundle import save_bundle
from rakuten_nb.models.training import SplitParams, TrainParams, train
from rakuten_nb.models.workspace import save_out_of_fold
from rakuten_nb.taxonomy import CODES

FOLDS = 3
EXPERTS = "text_linear,image" # no network: half the time, and the tests of networks have their own

def train_and_say(sample: Path, hard: Path, out: Path) -> None:
    "Train on one catalogue, save, and answer the other with the very objects that learned."
    bundle, out_of_fold = train(read_catalog(sample), TrainParams(split=SplitParams(folds=FOLDS)), EXPERTS)
    said = bundle.predict(read_catalog(hard).products)
    save_bundle(bundle, out / "bundle")
    save_out_of_fold(out_of_fold, out / "out_of_fold")
    np.savez(out / "said.npz", code=np.array(CODES)[said.proba.argmax(1)], confidence=said.confidence, seen=said.seen)

if __name__ == "__main__": train_and_say(*map(Path, sys.argv[1:]))
