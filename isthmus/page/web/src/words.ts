// Numbers and names in plain words.

/** A number with a minus sign where it has one, which is as wide as a plus sign. */
export const signed = (value: number): string => value.toFixed(2).replace("-", "−");

export const percent = (share: number): string => `${Math.round(100 * share)} %`;

export function bytes(count: number): string {
  if (count < 1000) return `${count} bytes`;
  if (count < 1e6) return `${(count / 1000).toFixed(1)} kB`;
  return `${(count / 1e6).toFixed(1)} MB`;
}

export function seconds(value: number): string {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

export function clock(unix: number): string {
  return new Date(unix * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

export function day(unix: number): string {
  const at = new Date(unix * 1000);
  const today = new Date().toDateString() === at.toDateString();
  return today ? clock(unix) : `${at.toLocaleDateString()} ${clock(unix)}`;
}

export function count(number: number, one: string, many = `${one}s`): string {
  return `${number} ${number === 1 ? one : many}`;
}

const STAGES: Record<string, string> = {
  start: "starting",
  enrol: "enrolling at the cloud",
  fetch_base: "fetching the first student",
  verify_base: "checking the first student",
  swap_base: "taking the first student into use",
  make_prototypes: "looking at your clips",
  make_prototypes_again: "looking at your clips again",
  upload: "sending prototypes",
  watch: "the cloud is making your student",
  fetch_interim: "fetching this round's student",
  verify_interim: "checking this round's student",
  fetch_final: "fetching your student",
  verify_final: "checking your student",
  judge: "comparing your student with the present one",
  swap_final: "taking your student into use",
  repair: "fetching a damaged student again",
};

export const stage = (name: string): string => STAGES[name] ?? name.replaceAll("_", " ");

export function which(sound: boolean, picture: boolean): string {
  if (sound && picture) return "sound and picture";
  return sound ? "sound" : picture ? "picture" : "nothing";
}
