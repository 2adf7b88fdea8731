import { gzipSync } from "node:zlib";

/** ONNX Runtime's WebAssembly is 14 MB, and 4 MB compressed. The server sends it as it is kept. */
const compressed = {
  name: "compressed-wasm",
  generateBundle(_options, bundle) {
    for (const [name, asset] of Object.entries(bundle))
      if (name.endsWith(".wasm")) {
        delete bundle[name];
        this.emitFile({ type: "asset", fileName: `${name}.gz`, source: gzipSync(asset.source, { level: 9 }) });
      }
  },
};

// Files with fixed names, so that what is committed can be compared with what is built.
export default {
  base: "./",
  plugins: [compressed],
  build: {
    outDir: "../built",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    chunkSizeWarningLimit: 1000,
    rollupOptions: {
      input: { page: "index.html", browser: "browser.html", student: "src/student.ts", recorder: "src/recorder.ts" },
      output: {
        entryFileNames: "[name].js",
        chunkFileNames: "[name].js",
        assetFileNames: (asset) => (asset.names[0].endsWith(".wasm") ? "[name][extname]" : "page[extname]"),
      },
    },
  },
};
