"""Every question of the doctor, asked in the order in which failures should be mended.

Knows nothing of how the answers are shown, and changes nothing. Invariant: no check raises, and
each one that fails names the next step.
"""

from diccae.doctor import libraries, machine, recipe, services
from diccae.doctor.check import Check


def run_doctor(
    store: str | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    config: str | None = None,
    init: str | None = None,
) -> list[Check]:
    """Check the machine, and whatever of store, MLflow server, cluster and config file is named.

    Args: init: weights that `config` is to start from, as of `pretrain --init`.
    Returns: checks in the order in which their failures should be mended; about 20 s.
    """
    checks = [
        libraries.check_python(),
        libraries.check_versions(),
        libraries.check_devices(),
        libraries.check_blas(),
        libraries.check_codecs(),
        libraries.check_decord(),
        machine.check_shared_memory(),
        machine.check_ray_folder(),
        services.check_token(),
        machine.check_ray_start(),
        machine.check_disk(store),
    ]
    if store:
        checks.append(services.check_store(store))
    if tracking_uri:
        checks.append(services.check_mlflow(tracking_uri))
    if address:
        checks.append(services.check_cluster(address))
    if config:
        checks.append(recipe.check_recipe(config, store, init))
        checks.append(recipe.check_memory(config, store))
        checks.append(recipe.check_place(config, address))
    return checks
