"""PURE: what policies and orders inherit that keep no views of their own: nothing happens when requests come and go."""

from isthmus.cloud.generation.scheduling.policy import Life
from isthmus.cloud.generation.scheduling.profile import GenerationProfile


class Unmoved:
    """Ignores profiles, arrivals and ends. Subclasses override what they need."""

    def use(self, profile: GenerationProfile) -> None:
        pass

    def arrived(self, life: Life) -> None:
        pass

    def left(self, life: Life) -> None:
        pass
