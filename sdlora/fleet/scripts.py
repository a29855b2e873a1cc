"""The list of a fleet for other schedulers: a Slurm array, or a RayJob for KubeRay. Text only; nothing of either is needed."""

import json
import math
import shlex
from collections.abc import Sequence

from sdlora.fleet.folder import Job
from sdlora.fleet.work import Fleet, command

STOP_S = 120
"""Before a time limit or a preemption, to save and stop."""


def slurm(fleet: Fleet, jobs: Sequence[Job]) -> str:
    """An array script: one element a job. An element that is asked to stop saves, and is queued again."""
    cpus, gpus = max(job.cpus for job in jobs), max(math.ceil(job.gpus or 0) for job in jobs)
    limit = min(fleet.limits.values(), default=0)
    head = [
        "#!/bin/bash",
        "#SBATCH --job-name=sdlora-fleet",
        f"#SBATCH --array=0-{len(jobs) - 1}{f'%{limit}' if limit else ''}",
        f"#SBATCH --cpus-per-task={cpus}",
        *([f"#SBATCH --gres=gpu:{gpus}"] if gpus else []),
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=sdlora-fleet-%A_%a.log",
        f"#SBATCH --signal=TERM@{STOP_S}",
        "# Every element has the room of the largest job: Slurm gives all of an array the same. Add --partition, --time and --mem here.",
        "set -u",
        "",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for i, job in enumerate(jobs):
        words = shlex.join(["python", *command(fleet, job, 1)])
        if "sdlora.fleet.carried" in words:  # an element that is queued again is the next attempt
            words = f"{words.removesuffix(' 1')} $((1 + ${{SLURM_RESTART_COUNT:-0}}))"
        head.append(f"  {i}) export OMP_NUM_THREADS={job.cpus}; srun {words} ;;")
    tail = [
        '  *) echo "no job of this number: $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;',
        "esac",
        "code=$?",
        '[ "$code" -eq 143 ] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        'exit "$code"',
    ]
    return "\n".join([*head, *tail]) + "\n"


def ray_yaml(fleet: Fleet, jobs: Sequence[Job], image: str, claim: str, workers: int) -> str:
    """A RayJob of KubeRay (ray.io/v1) whose driver works this fleet's folder off; the folder lies on a volume that all pods mount."""
    cpus, gpus = max(job.cpus for job in jobs), max(math.ceil(job.gpus or 0) for job in jobs)
    root = str(fleet.folder.place.resolve())
    limits = [word for user, most in fleet.limits.items() for word in ("--limit", f"{user}={most}")]
    run = shlex.join(["sdlora", "fleet", "--in", root, "--store", fleet.store, "--on", "auto", *limits])

    def pod(name: str, cpus: int, gpus: int) -> str:
        room = f"{{cpu: {json.dumps(str(cpus))}{f', nvidia.com/gpu: {gpus}' if gpus else ''}}}"
        return f"""spec:
            containers:
              - name: {name}
                image: {json.dumps(image)}
                env:
                  - {{name: RAY_USAGE_STATS_ENABLED, value: "0"}}
                resources: {{limits: {room}, requests: {room}}}
                volumeMounts:
                  - {{name: fleet, mountPath: {json.dumps(root)}}}
            volumes:
              - name: fleet
                persistentVolumeClaim: {{claimName: {json.dumps(claim)}}}"""

    return f"""# kubectl apply -f this file, where KubeRay runs. The image needs sdlora[ray]; the claim's volume is the fleet's folder.
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: sdlora-fleet
spec:
  entrypoint: {json.dumps(run)}
  shutdownAfterJobFinishes: true
  backoffLimit: 3
  rayClusterSpec:
    headGroupSpec:
      rayStartParams: {{num-cpus: "0", dashboard-host: "0.0.0.0"}}
      template:
          {pod("head", 1, 0)}
    workerGroupSpecs:
      - groupName: workers
        replicas: {workers}
        minReplicas: {workers}
        maxReplicas: {workers}
        rayStartParams: {{}}
        template:
          {pod("worker", cpus, gpus)}
"""
