"""A device's identity at its cloud."""

from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.behaviour import state as behaviour
from isthmus.edge.link.interface import Link
from isthmus.edge.own_clips import budget as budgets
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import Enrolment


def enrol_anew(config: RunConfig, device: DeviceState, link: Link) -> str:
    """Give the device a new identity and return its id. Ledger and budget stay, and so do sound students.

    Raises what the link raises; the old identity is then kept.
    """
    state = device.agent()
    enrolment = enrolled(config, device, link)
    if state != behaviour.State():
        device.save_agent(behaviour.enrol_anew(state))
    return enrolment.device_id


def enrolled(config: RunConfig, device: DeviceState, link: Link) -> Enrolment:
    """Enrol the device, keep its new identity on disk and return it. Raises what the link raises, and InvalidInput."""
    enrolment = link.enrol(config.device_name, config.enrolment_key)
    try:
        InputSpec.from_json(enrolment.input_spec_json)
    except ValueError as error:
        raise InvalidInput(f"the cloud's {error}") from error
    device.save_budget(budgets.pinned(device.budget(), enrolment.rounds))
    device.save_enrolment(enrolment)
    return enrolment
