"Asks the registry for its champion and the bundle itself for the same rows; prints what came of it as JSON. Arguments: project, rows."
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from rakuten_nb.models.bundle import load_bundle
from rakuten_nb.models.workspace import Workspace, load_prepared
from rakuten_nb.tracking.registry import open_tracking

ws, rows = Workspace(Path(sys.argv[1])), int(sys.argv[2])
frame = pd.read_csv(ws.raw / "X_train_update.csv").head(rows)
pictures = [ws.raw / f"image_train/image_{i}_product_{p}.jpg" for i, p in zip(frame["imageid"], frame["productid"], strict=True)]
frame["image"] = pd.Series([p.read_bytes() if p.is_file() else None for p in pictures], dtype=object)
with open_tracking() as mlflow: said = mlflow.pyfunc.load_model("models:/rakuten-product-type@champion").predict(frame)
own = load_bundle(ws.bundle).predict(load_prepared(ws.preprocessed, ws.raw).train[:rows])
print(json.dumps({"rows": len(said), "pictures": int(frame["image"].notna().sum()), "differ": float(np.abs(said["confidence"] - own.confidence).max()),
                  "same": [p.prdtypecode for p in own] == said["prdtypecode"].astype(object).where(said["prdtypecode"].notna(), None).tolist()}))
