"Write a catalogue of fifty products whose texts or pictures are hard to decode consistently."
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rakuten_nb.data.catalog import Products, make_products, read_catalog, write_split
from rakuten_nb.data.picture import decode_picture
from rakuten_nb.data.sample import make_sample

HOW_MANY = 50
ORIENTATION = 274 # EXIF tag

def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    "A picture file."
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()

def turned(image: Image.Image, orientation: int = 6) -> bytes:
    "A JPEG with an EXIF orientation."
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, "JPEG", exif=exif, quality=90)

def sixteen_bit(image: Image.Image) -> bytes:
    "A grey PNG with 16 bits a pixel; the low byte is not zero."
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")

def cut_out(image: Image.Image) -> bytes:
    "A PNG whose left half is transparent."
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, image.width // 2, image.height))
    image = image.copy()
    image.putalpha(alpha)
    return encoded(image, "PNG")

def hard_cases(image: Image.Image) -> list[tuple[str, str, bytes | None]]: # title, description, picture
    "One difficulty a product, without another modality that could hide it."
    plain = encoded(image, "JPEG")
    return [
        ("Lot de 12 cartes à jouer Pokémon, très bon état", "", None),
        ("", "", plain),
        ("", "", turned(image)),
        ("", "", turned(image, 7)),
        ("", "", encoded(image.convert("CMYK"), "JPEG")),
        ("", "", sixteen_bit(image)),
        ("", "", cut_out(image)),
        ("", "", encoded(image, "WEBP", lossless=True)),
        ("", "Description sans titre : salon de jardin en résine tressée, quatre fauteuils", plain),
        ("<b>Piscine</b> tubulaire&nbsp;&amp;amp; b&acirc;che <br/>4,5&nbsp;m <span style='color:red'>PROMO</span>",
         "", None),
        ("Roman policier",
         " ".join(f"chapitre {i} l'inspecteur poursuit l'enquête n°{i % 17}" for i in range(400)), None),
        ("🎮 Console rétro 🔥🔥 manette ✨ sans fil 👍🏽", "😀" * 40, None),
        ("Coussin   brodé\t\x07 40×40 cm\u200b", "", plain),
        ("ﬁgurine “Ｄｒａｇｏｎ” n°①", "HOUSSE DE COUETTE EN COTON ÉGYPTIEN", None),
        ("LAMPE DE CHEVET", "<p>Lampe <i>scandinave</i></p>" * 3, turned(image, 3)),
    ]

def write_hard_products(out: Path) -> None:
    "Write the hard products, then ordinary ones of another seed, into a folder; the last ten form X_test."
    with tempfile.TemporaryDirectory() as scratch:
        plain = read_catalog(make_sample(Path(scratch) / "plain", HOW_MANY, seed=7, progress=False)).products
        image = decode_picture(next(p for p in plain.picture if p is not None))
        title, description, picture = (list(column) for column in zip(*hard_cases(image), strict=True))
        ids = [[str(i) for i in range(first, len(title) + first)] for first in (1, 101)]
        cases = make_products(title, description, picture, *ids)
        parts = cases, plain[: HOW_MANY - len(cases)]
        products = Products(*(np.concatenate([getattr(p, f) for p in parts]) for f in Products.__dataclass_fields__))
        write_split(out, "train", products[: HOW_MANY - 10])
        write_split(out, "test", products[HOW_MANY - 10 :], HOW_MANY - 10)
