"Compares the registered champion with the bundle on the same products; prints JSON. Arguments: project, rows."
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
ids = zip(frame["imageid"], frame["productid"], strict=True)
pictures = [ws.raw / f"image_train/image_{imageid}_product_{productid}.jpg" for imageid, productid in ids]
frame["image"] = pd.Series([p.read_bytes() if p.is_file() else None for p in pictures], dtype=object)
with open_tracking() as mlflow:
    table = mlflow.pyfunc.load_model("models:/rakuten-product-type@champion").predict(frame)
predictions = load_bundle(ws.bundle).predict(load_prepared(ws.preprocessed, ws.raw).train[:rows])
codes = table["prdtypecode"].astype(object).where(table["prdtypecode"].notna(), None).tolist()
difference = float(np.abs(table["confidence"] - predictions.confidence).max())
print(json.dumps({"rows": len(table), "pictures": int(frame["image"].notna().sum()), "largest_difference": difference,
                  "same_codes": [p.prdtypecode for p in predictions] == codes}))
