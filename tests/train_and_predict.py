"Train a bundle on catalogue SAMPLE, and save it and its predictions for catalogue HARD in OUT. Usage: SAMPLE HARD OUT."
import sys
from pathlib import Path

import numpy as np

from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.bundle import save_bundle
from rakuten_nb.models.training import SplitParams, TrainParams, train
from rakuten_nb.models.workspace import save_out_of_fold
from rakuten_nb.taxonomy import CODES

FOLDS = 3
EXPERTS = "text_linear,image" # without Keras, which halves the time; networks have tests of their own

def train_and_predict(sample: Path, hard: Path, out: Path) -> None:
    "Train on one catalogue, and predict the other with the trained objects, before they are saved and loaded."
    bundle, out_of_fold = train(read_catalog(sample), TrainParams(split=SplitParams(folds=FOLDS)), EXPERTS)
    predictions = bundle.predict(read_catalog(hard).products)
    save_bundle(bundle, out / "bundle")
    save_out_of_fold(out_of_fold, out / "out_of_fold")
    codes = np.array(CODES)[predictions.proba.argmax(1)]
    np.savez(out / "predictions.npz", code=codes, confidence=predictions.confidence, seen=predictions.seen)

if __name__ == "__main__": train_and_predict(*map(Path, sys.argv[1:]))
