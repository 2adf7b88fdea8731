"""Synthetic data sets in CREMA-D's and AVE's layouts: real files, invented content.

Nobody was recorded or photographed. In the CREMA-D layout a formant synthesiser speaks and a drawn face talks; both
express the emotion through cues (pitch, rate, brightness...; brows, eyes, mouth). In the AVE layout the events are
chimes, rattles and hisses with turning shapes, under AVE's category names. Accuracies on these sets show whether the
software works, not how well a method works on people.

``difficulty`` from 0 to 1 weakens the cues and increases their spread, the background noise and the grain. Actors
differ in voice, looks and light, and in how they express each emotion. Everyone has one of four styles with small
differences of their own, so one person differs from the average, and a few others resemble them. Personalisation makes
use of this. ``People`` says how far people lie apart; ``MEASURED`` holds the values that give the spread of RavFace,
whose voices are real and whose faces were drawn from measurements of real ones.

The same arguments give the same files, byte for byte, with the same library versions.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.data.layouts import crema_d
from isthmus.data.layouts.ave import ANNOTATIONS, LISTS, PRIVATE_LIST, PUBLIC_LISTS
from isthmus.data.layouts.ave import VIDEO_FOLDER as AVE_FOLDER
from isthmus.data.media.encode import write_flv, write_mp4, write_wav
from isthmus.data.progress import progress_bar
from isthmus.data.synthetic import event as synthetic_event
from isthmus.data.synthetic import face as synthetic_face
from isthmus.data.synthetic import voice as synthetic_voice

MAKER: Final = "synthetic.json"
"""File in the root that says the set is synthetic, and from which arguments it was made."""
VERSION: Final = 1

SENTENCES: Final = {
    "DFA": "ooaieA",
    "IEO": "ieAoe",
    "IOM": "aoieAu",
    "ITH": "aieAoia",
    "ITS": "ieauo",
    "IWL": "aAioae",
    "IWW": "aoeauie",
    "MTI": "Aeoiau",
    "TAI": "eiAoau",
    "TIE": "aieouA",
    "TSI": "eauioe",
    "WSI": "eoaAiu",
}
LEVELS: Final = ("XX", "LO", "MD", "HI")
MAX_TAKES: Final = len(SENTENCES) * len(LEVELS)
MAX_ACTORS: Final = 999
STYLES: Final = 4
MOST_SPREAD: Final = 1.5
"""Beyond it, heads leave the picture."""

# A row per class of crema_d.CLASSES.
_VOICE_CUES_CV: Final = np.array(
    [
        # pitch, range, slope, rate, brightness, roughness
        [0.0, -0.3, 0.0, 0.0, 0.0, -0.3],
        [0.7, 0.9, 0.6, 0.4, 0.4, -0.3],
        [-0.6, -0.8, -0.6, -0.9, -0.9, 0.0],
        [1.0, 0.0, 0.3, 0.9, -0.2, 0.8],
        [-0.5, 0.3, -0.9, -0.6, 0.2, 0.7],
        [0.4, 0.6, -0.3, 0.5, 1.0, 0.4],
    ]
)
_FACE_CUES_CV: Final = np.array(
    [
        # brow raise, brow furrow, eye open, mouth curve, mouth open, mouth width
        [0.0, 0.0, 0.0, 0.0, -0.3, 0.0],
        [0.2, -0.3, -0.2, 1.0, 0.5, 0.8],
        [0.2, -0.9, -0.5, -0.8, -0.3, -0.4],
        [0.9, -0.6, 0.9, -0.3, 0.5, 0.1],
        [-0.4, 0.5, -0.7, -0.6, -0.2, -0.2],
        [-0.7, 1.0, 0.4, -0.4, 0.2, 0.4],
    ]
)


@dataclass(frozen=True)
class Difficulty:
    """The quantities that ``difficulty`` changes."""

    knob: float

    @property
    def cue(self) -> float:
        """Factor of the cues that all people share."""
        return 1.2 - 0.7 * self.knob

    @property
    def spread(self) -> float:
        """Deviation of each cue from clip to clip."""
        return 0.05 + 0.45 * self.knob

    @property
    def snr_db(self) -> float:
        return 36.0 - 26.0 * self.knob

    @property
    def grain(self) -> float:
        return 2.0 + 18.0 * self.knob


@dataclass(frozen=True)
class People:
    """The knobs of how far people lie apart. The defaults give the people of earlier versions.

    What they shift is the same in all clips of a person, so they set the variance between persons.
    """

    voices: float = 1.0
    """Factor on how far a voice (pitch, vocal tract, breath) is from the average one."""
    faces: float = 1.0
    """Factor on how far a face's measures and its light are from the average ones."""
    resting: float = 0.0
    """Deviation of each cue of a face at rest: some people's brows are always low, some always seem to smile."""

    def __post_init__(self) -> None:
        for name, most in (("voices", MOST_SPREAD), ("faces", MOST_SPREAD), ("resting", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: {getattr(self, name):g} is not between 0 and {most:g}")


@dataclass(frozen=True)
class Actor:
    """An invented person: voice, looks, and an own way to express each emotion."""

    name: str
    voice: synthetic_voice.Voice
    face: synthetic_face.Face
    voice_habit_CV: npt.NDArray[np.float64]
    face_habit_CV: npt.NDArray[np.float64]

    @staticmethod
    def draw(number: int, seed: int, people: People = People()) -> "Actor":
        """Return actor ``number`` (from 0) of a seed; the other actors do not matter."""
        rng = np.random.default_rng([seed, 1, number])
        style = np.random.default_rng([seed, 2, number % STYLES])
        resting_V = np.random.default_rng([seed, 6, number]).normal(size=len(synthetic_face.CUES))
        shapes = (_VOICE_CUES_CV.shape, _FACE_CUES_CV.shape)
        voice_habit, face_habit = (style.normal(0, 0.3, shape) + rng.normal(0, 0.12, shape) for shape in shapes)
        return Actor(
            f"{1001 + number}",
            synthetic_voice.Voice.draw(rng).spread(people.voices),
            synthetic_face.Face.draw(rng).spread(people.faces),
            voice_habit,
            face_habit + people.resting * resting_V,
        )


@dataclass(frozen=True)
class Guest:
    """A person with clips of their own choice of classes, after the people who have all of them.

    ``classes`` are labels of ``crema_d.CLASSES``; ``takes`` is the number of clips of each.
    """

    classes: tuple[int, ...]
    takes: int


MEASURED: Final = People(voices=0.55, faces=1.0, resting=0.25)
"""People as far apart as those of RavFace, at difficulty 0.5: 'isthmus data spread' measures both."""


def make_crema_d(
    root: Path,
    *,
    actors: int,
    takes: int,
    seed: int,
    difficulty: float,
    people: People = People(),
    guests: Sequence[Guest] = (),
    progress: bool = True,
) -> None:
    """Write a synthetic set in CREMA-D's layout: ``actors`` people with ``takes`` clips of each of the six emotions.

    Actors are 1001, 1002, ...; ``guests`` follow them with classes and takes of their own. ``people`` says how far
    people lie apart. A set begun with the same arguments is completed. Raises ValueError for arguments out of bounds,
    and if ``root`` already holds anything else.

    >>> make_crema_d(folder / "set", actors=1, takes=1, seed=0, difficulty=0.2, progress=False)
    >>> len(read_listing(folder / "set").refs)
    6
    """
    _check("actors", actors, 1, MAX_ACTORS)
    _check("takes", takes, 1, MAX_TAKES)
    for guest in guests:
        _check("takes", guest.takes, 1, MAX_TAKES)
        if not guest.classes or not set(guest.classes) <= set(range(len(crema_d.CLASSES))):
            raise ValueError(f"classes: {guest.classes} are not labels from 0 to {len(crema_d.CLASSES) - 1}")
    _check("actors and guests", actors + len(guests), 1, MAX_ACTORS)
    _begin(root, _arguments(actors, takes, people, guests), seed, difficulty)
    for folder in (crema_d.AUDIO_FOLDER, crema_d.VIDEO_FOLDER):
        (root / folder).mkdir(exist_ok=True)
    everyone = [Guest(tuple(range(len(crema_d.CLASSES))), takes)] * actors + list(guests)
    plan = [
        (number, label, take)
        for number, each in enumerate(everyone)
        for label in each.classes
        for take in range(each.takes)
    ]
    drawn = [Actor.draw(number, seed, people) for number in range(len(everyone))]

    def write(number: int, label: int, take: int) -> None:
        sentence, level = list(SENTENCES)[take % len(SENTENCES)], LEVELS[take // len(SENTENCES)]
        name = f"{drawn[number].name}_{sentence}_{crema_d.CLASSES[label]}_{level}"
        rng = np.random.default_rng([seed, 3, number, label, take])
        _write_person(root, name, drawn[number], label, rng, Difficulty(difficulty))

    # Drawing, filters and encoders release the interpreter's lock, and each clip has its own random numbers.
    with progress_bar(enabled=progress) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = bar.add_task("making synthetic clips", total=len(plan))
        try:
            for _ in pool.map(lambda clip: write(*clip), plan):
                bar.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _arguments(actors: int, takes: int, people: People, guests: Sequence[Guest]) -> dict[str, Any]:
    """Return what synthetic.json says of a set. What has its default is left out, as in sets of earlier versions."""
    what: dict[str, Any] = {"layout": crema_d.LAYOUT, "actors": actors, "takes": takes}
    if people != People():
        what["people"] = asdict(people)
    if guests:
        what["guests"] = [{"classes": list(guest.classes), "takes": guest.takes} for guest in guests]
    return what


def _write_person(
    root: Path, name: str, actor: Actor, label: int, rng: np.random.Generator, difficulty: Difficulty
) -> None:
    wav = root / crema_d.AUDIO_FOLDER / f"{name}.wav"
    flv = root / crema_d.VIDEO_FOLDER / f"{name}.flv"
    if wav.exists() and flv.exists():
        return
    voice_V = _expressed(_VOICE_CUES_CV[label], actor.voice_habit_CV[label], rng, difficulty)
    face_V = _expressed(_FACE_CUES_CV[label], actor.face_habit_CV[label], rng, difficulty)
    vowels = SENTENCES[name.split("_")[1]]
    waveform_T = synthetic_voice.speak(actor.voice, voice_V, vowels, rng, snr_db=difficulty.snr_db)
    rate = synthetic_voice.RATE_HZ
    loudness_K = _loudness(waveform_T, rate, synthetic_face.FPS)
    frames_KHWC = synthetic_face.film(
        actor.face, face_V, loudness_K, rng, grain=difficulty.grain, unrest=difficulty.knob
    )
    write_wav(wav, waveform_T, rate)
    write_flv(flv, frames_KHWC, synthetic_face.FPS, waveform_T, rate)


def _expressed(
    common_V: npt.NDArray[np.float64],
    habit_V: npt.NDArray[np.float64],
    rng: np.random.Generator,
    difficulty: Difficulty,
) -> npt.NDArray[np.float64]:
    cues_V: npt.NDArray[np.float64] = (
        difficulty.cue * common_V + habit_V + rng.normal(0, difficulty.spread, len(common_V))
    )
    return cues_V


def _loudness(waveform_T: npt.NDArray[np.float32], rate_hz: int, fps: int) -> npt.NDArray[np.float64]:
    """Return the root mean square per video frame, 1 at the loudest."""
    samples = rate_hz // fps
    count = max(2, len(waveform_T) // samples)
    loudness_K = np.sqrt(np.mean(np.resize(waveform_T, (count, samples)).astype(np.float64) ** 2, axis=1))
    return np.asarray(loudness_K / (loudness_K.max() + 1e-9), np.float64)


def make_ave(
    root: Path, *, classes: int = 28, takes: int = 10, seed: int, difficulty: float, progress: bool = True
) -> None:
    """Write a synthetic set in AVE's layout: ``takes`` events of each of the first ``classes`` categories.

    A tenth of every category, at least one event, goes to testSet.txt, as many to valSet.txt, the rest to trainSet.txt.
    Every video lasts 10 s. In every tenth video a second event, of another category, follows the first. Raises
    ValueError for arguments out of bounds, and if ``root`` already holds anything else.
    """
    _check("classes", classes, 2, len(synthetic_event.CATEGORIES))
    _check("takes", takes, 3, 1000)
    _begin(root, {"layout": "ave", "classes": classes, "takes": takes}, seed, difficulty)
    (root / AVE_FOLDER).mkdir(exist_ok=True)
    lines: dict[str, list[str]] = {name: [] for name in LISTS}
    plans = list(_plan_videos(classes, takes, seed))
    with progress_bar(enabled=progress) as bar:
        task = bar.add_task("making synthetic clips", total=len(plans))
        for number, (video_id, list_name, spans) in enumerate(plans):
            path = root / AVE_FOLDER / f"{video_id}.mp4"
            if not path.exists():
                rng = np.random.default_rng([seed, 5, number])
                knob = Difficulty(difficulty)
                frames_KHWC, waveform_T = synthetic_event.record(
                    spans, rng, cue_spread=knob.spread, snr_db=knob.snr_db, grain=knob.grain
                )
                write_mp4(path, frames_KHWC, synthetic_event.FPS, waveform_T, synthetic_event.RATE_HZ)
            for span in spans:
                category = synthetic_event.CATEGORIES[span.category]
                lines[list_name].append(f"{category}&{video_id}&good&{span.start_s}&{span.end_s}")
            bar.advance(task)
    for name, events in lines.items():
        (root / name).write_text("".join(event + "\n" for event in events))
    everything = [event for name in (*PUBLIC_LISTS, PRIVATE_LIST) for event in lines[name]]
    header = "Category&VideoID&Quality&StartTime&EndTime"
    (root / ANNOTATIONS).write_text("".join(line + "\n" for line in [header, *everything]))


def _plan_videos(classes: int, takes: int, seed: int) -> Iterator[tuple[str, str, Sequence[synthetic_event.Span]]]:
    """Yield the id, the list and the events of every video."""
    alphabet = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
    held_out = max(1, takes // 10)
    rng = np.random.default_rng([seed, 4])
    number = 0
    for take in range(takes):
        list_name = PRIVATE_LIST if take < held_out else PUBLIC_LISTS[1] if take < 2 * held_out else PUBLIC_LISTS[0]
        for category in range(classes):
            video_id = "".join(rng.choice(alphabet, 11))
            if number % 10 == 9:
                other = (category + 1 + int(rng.integers(classes - 1))) % classes
                middle = int(rng.integers(4, 7))
                spans = [synthetic_event.Span(category, 0, middle), synthetic_event.Span(other, middle, 10)]
            else:
                start = int(rng.integers(0, 5))
                spans = [synthetic_event.Span(category, start, int(rng.integers(start + 3, 11)))]
            number += 1
            yield video_id, list_name, spans


def _begin(root: Path, what: Mapping[str, Any], seed: int, difficulty: float) -> None:
    """Mark ``root`` as a synthetic set of these arguments. Raises ValueError if it holds anything else."""
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty {difficulty:g} is not between 0 and 1")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative")
    marker = {"synthetic": True, "version": VERSION, **what, "seed": seed, "difficulty": difficulty}
    path = root / MAKER
    if path.is_file():
        if json.loads(path.read_text()) != marker:
            raise ValueError(f"{root} holds a synthetic set of other arguments: choose another folder, or remove it")
        return
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty: choose a new folder for the synthetic set")
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(marker, indent=1) + "\n")


def _check(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{what}: {value} is not between {least} and {most}")
