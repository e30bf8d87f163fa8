"""path.sh, which makes the environment."""

import shutil
import subprocess

from tests.recipe_copy import ROOT


def test_leaves_a_linked_environment_as_it_is(tmp_path):
    environment = tmp_path / "other"
    environment.mkdir()
    (environment / "lock-hash").write_text("of another lock\n")
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    for name in ("path.sh", "requirements.lock"):
        shutil.copy(ROOT / name, recipe)
    (recipe / ".venv").symlink_to(environment)
    done = subprocess.run(["bash", "-c", ". ./path.sh"], cwd=recipe, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "path.sh: .venv is a link, to an environment made from another requirements.lock; "
        "remove the link, and call again"
    ]
    assert [path.name for path in environment.iterdir()] == ["lock-hash"]
