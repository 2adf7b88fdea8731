"""The public names and the modules they are imported from when first used. isthmus/__init__.py reads this file."""

from .cloud.elastic.model.vit import ElasticViT
from .cloud.elastic.model.weights import load_vit
from .cloud.elastic.policies.by_name import POLICIES, add_policy, make_policy
from .cloud.elastic.scheduling.bound import clairvoyant_bound
from .cloud.elastic.scheduling.engine import Engine
from .cloud.elastic.scheduling.policy import Choice, Policy
from .cloud.elastic.scheduling.profile import Profile, paper_profile
from .cloud.elastic.scheduling.query import Query
from .cloud.elastic.scheduling.simulate import simulate
from .cloud.elastic.scheduling.workload import queries_at_load
from .cloud.elastic.tasks.task import TaskSpec, TaskWeights
from .cloud.generation.serve.settings import GenerationSettings
from .cloud.rpc.elastic_client import ElasticClient
from .cloud.server import Server
from .cloud.settings import CloudSettings
from .data.cache.build import build_arrays
from .data.cache.read import ClipArrays
from .data.clip import ClipRef, Listing
from .data.layouts.listing import read_listing
from .data.synthetic.sets import make_crema_d
from .data.transforms import InputSpec
from .distill.prepare import begin_release, choose_split, recipe_for
from .distill.recipes import Recipe
from .distill.release import Release
from .distill.selection import STRATEGIES, add_strategy
from .distill.selection.interface import Public, Selection, Strategy, Wanted
from .distill.student.base import make_base, make_student
from .distill.student.evaluate import accuracy, student_outputs
from .distill.student.export import export_student
from .distill.student.personalise import distil_round, select_round, train_heads
from .distill.teacher.teach import cache_teacher_outputs, train_teacher
from .edge.agent.device_run import DeviceRun
from .edge.agent.device_state import DeviceState
from .edge.agent.run_config import RunConfig
from .edge.agent.runtime import Runtime
from .edge.link.over_grpc import GrpcLink
from .edge.own_clips.prototypes import make_prototypes
from .edge.student.encoder import StudentEncoder
from .proto.errors import InvalidInput, IsthmusError
from .proto.messages import Features, Prototypes, UploadMode

__version__: str

__all__ = [
    "POLICIES",
    "STRATEGIES",
    "Choice",
    "ClipArrays",
    "ClipRef",
    "CloudSettings",
    "DeviceRun",
    "DeviceState",
    "ElasticClient",
    "ElasticViT",
    "Engine",
    "Features",
    "GenerationSettings",
    "GrpcLink",
    "InputSpec",
    "InvalidInput",
    "IsthmusError",
    "Listing",
    "Policy",
    "Profile",
    "Prototypes",
    "Public",
    "Query",
    "Recipe",
    "Release",
    "RunConfig",
    "Runtime",
    "Selection",
    "Server",
    "Strategy",
    "StudentEncoder",
    "TaskSpec",
    "TaskWeights",
    "UploadMode",
    "Wanted",
    "accuracy",
    "add_policy",
    "add_strategy",
    "begin_release",
    "build_arrays",
    "cache_teacher_outputs",
    "choose_split",
    "clairvoyant_bound",
    "distil_round",
    "export_student",
    "load_vit",
    "make_base",
    "make_crema_d",
    "make_policy",
    "make_prototypes",
    "make_student",
    "paper_profile",
    "queries_at_load",
    "read_listing",
    "recipe_for",
    "select_round",
    "simulate",
    "student_outputs",
    "train_heads",
    "train_teacher",
]
