"""MLflow's pod by its manifest, with a Postgres and a bucket of which it has the addresses."""

import json
import sys

import pytest
from support.box.box import Box, images
from support.box.node import why_not
from support.box.services import add_postgres, mlflow_secret, start_mlflow, why_no_postgres
from support.box.smallest import SECRETS, config

from deploy.render import render

WHY_NOT = why_not() or why_no_postgres()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
LOG_A_RUN = """
import json, mlflow
mlflow.set_tracking_uri("http://mlflow.diccae.svc.cluster.local:5000")
with mlflow.start_run() as run:
    mlflow.log_metric("loss", 0.5)
    mlflow.log_text("whole", "report.html")
client = mlflow.MlflowClient()
read = client.get_run(run.info.run_id)
print(json.dumps([read.data.metrics, [f.path for f in client.list_artifacts(run.info.run_id)]]))
"""


def test_a_run_is_logged_from_a_pod_that_knows_only_the_servers_name() -> None:
    secrets = {**SECRETS, "diccae-mlflow": mlflow_secret(SECRETS)}
    with Box(render(config()), secrets) as box:
        box.add_storage("mlflow")
        add_postgres(box)
        start_mlflow(box, images(config()), timeout_s=300)
        client = box.add_machine("client", "diccae", {"diccae.io/cluster": "diccae"})
        done = box.outside([sys.executable, "-c", LOG_A_RUN], client, 200)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [{"loss": 0.5}, ["report.html"]]
        stranger = box.add_machine("stranger", "diccae")
        url = f"http://{box.pods['mlflow'].machine.address}:5000/health"
        ask = ["wget", "-q", "-T", "2", "-t", "1", "-O-", url]
        assert box.outside(ask, client, 30).returncode == 0
        assert box.outside(ask, stranger, 30).returncode != 0
