".env.example lists all settings with the descriptions of the code."
from conftest import ROOT

from rakuten_nb.config import Settings, env_example

EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")

def test_it_equals_the_generated_text() -> None:
    assert env_example() == EXAMPLE, "write rakuten_nb.config.env_example() to .env.example"

def test_it_lists_every_setting_with_its_description() -> None:
    lines = EXAMPLE.splitlines()
    for name, field in Settings.model_fields.items():
        where = [i for i, line in enumerate(lines) if line.startswith(f"#{name.upper()}=")]
        assert len(where) == 1, f"{name} is listed once"
        assert field.description, f"{name} is explained"
        assert lines[where[0] - 1] == f"# {field.description}"

def test_it_sets_nothing() -> None:
    assert [line for line in EXAMPLE.splitlines() if line and not line.startswith("#")] == []
