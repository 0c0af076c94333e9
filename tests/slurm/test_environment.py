"""What a site needs before a job's first program: modules, a setup of its own, GPUs by --gres."""

from pathlib import Path

from tests.cluster.client import Cluster

# As a site's: read by its name only where the shell is no login shell, and not written for `set -u`.
MODULE = """
module() {
  [ "$1" = load ] && [ -z "$_A_VARIABLE_THAT_IS_NOT_SET" ] && [ "$2" != absent ] && export LOADED="$2+$3"
}
"""
SHOW = "import os; print('SEEN', *(os.environ.get(name) for name in ('LOADED', 'READY', 'CUDA_VISIBLE_DEVICES')))"


def test_modules_and_setup_come_first_and_gres_gives_a_step_its_gpus(
    slurm: Cluster, repo_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "init").mkdir()
    (tmp_path / "init/bash").write_text(MODULE)
    site = {
        "MODULESHOME": str(tmp_path),
        "TELLTALE_MODULES": "python cuda",
        "TELLTALE_SETUP": "export READY=$LOADED$_ANOTHER_ONE-ready",
        "TELLTALE_GRES": "gpu",
    }
    stage = repo_root / "slurm/stage.sh"
    job = slurm.sbatch("--gres=gpu:2", stage, "-c", SHOW, env=site)
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert "SEEN python+cuda python+cuda-ready 0,1" in slurm.log(job)
    job = slurm.sbatch(stage, "-c", SHOW, env={**site, "TELLTALE_MODULES": "absent"})
    assert slurm.wait(job) == "FAILED"
    assert "error: TELLTALE_MODULES=absent: module load failed" in slurm.log(job)
    assert "SEEN" not in slurm.log(job)
