// Where photos come from: file inputs, dropped files and folders, the clipboard, the camera. All give `{ file, name }`.

/** Files of an input or the clipboard; those of a chosen folder are named by their path in it. */
export function listed(files) {
  return Array.from(files, (file) => ({ file, name: file.webkitRelativePath || file.name }));
}

/** Files of a drop, those in folders included. */
export async function dropped(dataTransfer) {
  // Both are only valid until the event handler first waits.
  const entries = Array.from(dataTransfer.items, (item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const files = listed(dataTransfer.files);
  if (entries.length === 0) return files;
  return (await Promise.all(entries.map((entry) => walk(entry)))).flat();
}

async function walk(entry) {
  const ask = (object, method) => new Promise((resolve, reject) => object[method](resolve, reject));
  if (entry.isFile) return [{ file: await ask(entry, "file"), name: entry.fullPath.replace(/^\//, "") }];
  const reader = entry.createReader();
  const found = [];
  // It returns a part of a large folder at a time, then nothing.
  for (let part; (part = await ask(reader, "readEntries")).length > 0; ) {
    for (const child of part) found.push(...(await walk(child)));
  }
  return found;
}

/** Opens the camera in a dialog; each photo taken is passed to `add`. Rejects without a camera or permission. */
export async function openCamera(dialog, add) {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  const video = dialog.querySelector("video");
  video.srcObject = stream;
  dialog.addEventListener("close", () => stream.getTracks().forEach((track) => track.stop()), { once: true });
  dialog.querySelector("#camera-close").onclick = () => dialog.close();
  dialog.querySelector("#shoot").onclick = () => {
    const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    const name = `camera-${new Date().toISOString().replace(/[:.]/g, "-")}.png`;
    canvas.toBlob((blob) => add([{ file: blob, name }]));
    dialog.close();
  };
  dialog.showModal();
}
