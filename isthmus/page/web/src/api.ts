// The page's only ways to its server: a request, and the stream of what happens. Both are relative to the page's own
// address, which carries the token.

export type Facts = Record<string, any>;

export class Refused extends Error {}

export async function facts(): Promise<Facts> {
  return answered(await fetch("./api/page"));
}

/** What the service's metrics say. */
export async function numbers(): Promise<Facts> {
  return answered(await fetch("./api/numbers"));
}

/** The student that can run in this browser. */
export async function student(): Promise<Facts> {
  return answered(await fetch("./api/student"));
}

/** A file's bytes; `came` hears how many more are here. */
export async function fetched(path: string, came: (bytes: number) => void): Promise<ArrayBuffer> {
  const reply = await fetch(path);
  if (!reply.ok || !reply.body) await answered(reply);
  const parts: Uint8Array<ArrayBuffer>[] = [];
  const reader = reply.body!.getReader();
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    parts.push(read.value);
    came(read.value.length);
  }
  return new Blob(parts).arrayBuffer();
}

export async function ask(request: string, args: Facts = {}): Promise<Facts> {
  let reply: Response;
  try {
    reply = await fetch("./api/do", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ request, arguments: args }),
    });
  } catch {
    throw new Refused("The page's server does not answer. Is 'isthmus … page' still running?");
  }
  return answered(reply);
}

async function answered(reply: Response): Promise<Facts> {
  const text = await reply.text();
  let content: Facts;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Refused(text || `The server answered ${reply.status}.`);
  }
  if (!reply.ok) throw new Refused(String(content.error));
  return content;
}

/** The events of a running device. The browser connects again by itself; `gone` is called while it cannot. */
export function watch(look: boolean, heard: (kind: string, facts: any) => void, gone: () => void): () => void {
  let again = 0;
  let source: EventSource;
  const open = () => {
    source = new EventSource(`./api/watch?look=${look ? 1 : 0}`);
    for (const kind of ["device", "hello", "event", "look"])
      source.addEventListener(kind, (event) => heard(kind, JSON.parse((event as MessageEvent).data)));
    source.onerror = () => {
      gone();
      // After an answer that is no stream, such as "too many pages", the browser gives up: try again.
      if (source.readyState === EventSource.CLOSED) again = window.setTimeout(open, 2000);
    };
  };
  open();
  return () => {
    window.clearTimeout(again);
    source.close();
  };
}
