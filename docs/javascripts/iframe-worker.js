// Browsers refuse to start a Worker for a page opened from the file system. There, the script of the search runs in a
// hidden frame instead, with the same two messages: post to it, hear from it.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.loaded = new Promise((resolve) => {
        const append = () => {
          document.body.append(frame);
          const inside = frame.contentWindow;
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = frame.contentDocument.createElement("script");
          script.src = new URL(url, location);
          script.onload = () => resolve(inside);
          frame.contentDocument.body.append(script);
        };
        if (document.body) append();
        else addEventListener("DOMContentLoaded", append);
      });
    }

    postMessage(data) {
      this.loaded.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {}
  };
}
