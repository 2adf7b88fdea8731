// A view of the page.

export interface View {
  title: string;
  /** Whether it wants the pictures and the sound of now. */
  looks?: boolean;
  content: HTMLElement;
  /** What the device's stream says: `device`, `hello`, `event` or `look`. */
  heard?(kind: string, facts: any): void;
  /** Read everything anew: the view is opened, or the device is there again. */
  refresh?(): Promise<void>;
  /** Seconds after which it is to be read anew while it is open. */
  every?: number;
}

/** Say something to the person at the foot of the page. */
export function tell(text: string): void {
  document.getElementById("said")!.textContent = text;
}

/** Do something, and say what it says or why it failed. */
export async function attempt(work: () => Promise<string | void>): Promise<void> {
  try {
    tell((await work()) ?? "");
  } catch (error) {
    tell(error instanceof Error ? error.message : String(error));
  }
}
