// Stores all files of the site at the first visit and serves them from then on, so that the page works offline.
//
// The export writes three constants above: VERSION, a hash of the files; FILES, their addresses; POLICY, the page's
// content security policy, which workers have only by a header.

const PREFIX = `tinycap ${self.registration.scope} `;
const HEADERS = {
  "Content-Security-Policy": POLICY,
  // They isolate the page, which may then use several threads.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

self.addEventListener("install", (event) => {
  self.skipWaiting();
  const requests = FILES.map((name) => new Request(name, { cache: "reload" }));
  event.waitUntil(caches.open(PREFIX + VERSION).then((cache) => cache.addAll(requests)));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(removeOthers().then(() => self.clients.claim()));
});

async function removeOthers() {
  // Other programs of the same host have caches too.
  const old = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== PREFIX + VERSION);
  await Promise.all(old.map((name) => caches.delete(name)));
}

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(PREFIX + VERSION);
  const stored = await cache.match(request.mode === "navigate" ? "./" : request, { ignoreSearch: true });
  const response = stored ?? (await fetch(request));
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
