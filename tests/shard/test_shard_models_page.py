"""docs/models.md says what there is."""

import models_page


def test_the_page_is_current() -> None:
    assert models_page.PAGE.read_text() == models_page.page(), "run python tests/models_page.py"
