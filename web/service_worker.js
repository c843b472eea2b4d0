// Stores all files of the site at the first visit and serves them from then on, so that the page works offline.
//
// The export writes constants above: VERSION, a hash of all files; FILES, the addresses of those that the first caption
// needs; LATER, of the search's, each with its hash; POLICY, the page's content security policy, which workers have only
// by a header.

const PREFIX = `tinycap ${self.registration.scope} `;
const NAME = PREFIX + VERSION;
const HEADERS = {
  "Content-Security-Policy": POLICY,
  // They isolate the page, which may then use several threads.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

// A newer export waits until all pages of this one are closed, which may still have to load one of LATER.
self.addEventListener("install", (event) => {
  const requests = FILES.map((name) => new Request(name, { cache: "reload" }));
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(requests)));
});

// Sent after the first captions.
self.addEventListener("message", (event) => event.waitUntil(storeRest()));

async function storeRest() {
  const cache = await caches.open(NAME);
  for (const [name, integrity] of Object.entries(LATER)) {
    if (!(await cache.match(name))) await cache.add(new Request(name, { cache: "reload", integrity }));
  }
}

self.addEventListener("activate", (event) => {
  event.waitUntil(removeOthers().then(() => self.clients.claim()));
});

async function removeOthers() {
  // Other programs of the same host have caches too.
  const old = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== NAME);
  await Promise.all(old.map((name) => caches.delete(name)));
}

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(NAME);
  const stored = await cache.match(request.mode === "navigate" ? "./" : request, { ignoreSearch: true });
  const integrity = LATER[request.url.slice(self.registration.scope.length)] ?? "";
  const response = stored ?? (await fetch(request, { integrity }));
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
