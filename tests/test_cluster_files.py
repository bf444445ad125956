"""The files under docs/cluster: what they start exists and takes these options."""

import re
import shlex
import subprocess
from pathlib import Path

import yaml

from d2ext.config import find_config
from d2ext.engine.cli import argument_parser

FOLDER = Path(__file__).resolve().parents[1] / "docs/cluster"


def check_command(words):
    """`torchrun [...] -m d2ext train CONFIG ...`"""
    place = words.index("-m")
    assert words[0] == "torchrun" and words[place + 1 : place + 3] == ["d2ext", "train"]
    options = argument_parser().parse_intermixed_args(words[place + 3 :])
    # Without it, a job that is queued again would refuse to continue.
    assert options.resume and options.data
    find_config(options.opts[0] if not options.config_file else options.config_file)
    return words[1:place]


def test_the_slurm_script_is_bash_and_its_command_is_ours():
    script = FOLDER / "slurm.sh"
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = script.read_text()
    (command,) = re.findall(r"^srun (torchrun .*(?:\n    .*)*)", text, re.MULTILINE)
    for name, value in re.findall(r"^(\w+)=(\S+)$", text, re.MULTILINE):
        value = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        command = command.replace(f'"${name}"', value).replace(
            f'"{name}=${name}"', f"{name}={value}"
        )
    options = check_command(shlex.split(command.replace("\\\n", " ")))
    assert "--rdzv-backend=c10d" in options  # restarts of several machines need it
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert directives["ntasks-per-node"] == "1"  # torchrun starts the others


def test_the_job_of_kubernetes_asks_for_as_many_gpus_as_processes():
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    policy = spec["elasticPolicy"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    assert check_command(container["command"]) == []
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
