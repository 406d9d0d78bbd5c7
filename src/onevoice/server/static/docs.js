"use strict";
{
  /* Shows /openapi.json: routes by tag, their parameters, forms, and the JSON they answer. */

  const plain = (text) => (text ?? "").replaceAll("`", "");

  const make = (name, properties = {}, ...inside) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...inside.filter((each) => each !== null));
    return made;
  };

  const resolve = (schema, document) => (schema?.$ref ? schema.$ref.slice(2).split("/").reduce((part, key) => part[key], document) : schema ?? {});

  const typeOf = (schema, document) => {
    if (schema.$ref) return schema.$ref.split("/").pop();
    if (schema.anyOf) return schema.anyOf.map((each) => (each.type === "null" ? "null" : typeOf(each, document))).join(" or ");
    if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
    if (schema.const !== undefined) return JSON.stringify(schema.const);
    if (schema.prefixItems) return `[${schema.prefixItems.map((each) => typeOf(each, document)).join(", ")}]`;
    if (schema.type === "array") return `list of ${typeOf(schema.items ?? {}, document)}`;
    if (schema.format === "binary") return "file";
    const range = [schema.minimum !== undefined && `≥ ${schema.minimum}`, schema.maximum !== undefined && `≤ ${schema.maximum}`].filter(Boolean).join(", ");
    return [schema.format === "date-time" ? "date and time" : schema.type ?? "any", range && `(${range})`].filter(Boolean).join(" ");
  };

  const rowsOf = (schema, document) => Object.entries(schema.properties ?? {}).map(([name, field]) => [
    name, typeOf(field, document), (schema.required ?? []).includes(name) ? "required" : field.default === undefined || field.default === null ? "" : `default ${JSON.stringify(field.default)}`, plain(field.description),
  ]);

  const tableOf = (title, rows) => rows.length === 0 ? null : make("div", {className: "fields"}, make("h4", {textContent: title}), make("div", {className: "table", tabIndex: 0, role: "region", ariaLabel: title}, make("table", {}, make("tbody", {}, ...rows.map(([name, type, note, text]) => make("tr", {},
    make("th", {scope: "row"}, make("code", {textContent: name})), make("td", {textContent: [type, note].filter(Boolean).join(", ")}), make("td", {textContent: text})))))));

  const answerOf = (operation, document) => {
    const rows = Object.entries(operation.responses).map(([status, answer]) => {
      const contents = Object.entries(answer.content ?? {}).map(([type, {schema}]) => (schema && (schema.$ref || schema.items) ? `${typeOf(schema, document)} (${type})` : type));
      return [status, contents.join(", ") || "nothing", "", answer.description ?? ""];
    });
    return tableOf("Answers", rows);
  };

  const routeOf = (method, path, operation, document) => {
    const form = resolve(Object.values(operation.requestBody?.content ?? {})[0]?.schema, document);
    const parameters = (operation.parameters ?? []).map((each) => [each.name, typeOf(each.schema, document), each.required ? "required" : `default ${JSON.stringify(each.schema.default)}`, plain(each.description)]);
    return make("details", {className: "card route"},
      make("summary", {}, make("code", {className: `method ${method}`, textContent: method.toUpperCase()}), " ", make("code", {textContent: path}), " ", make("span", {className: "soft", textContent: plain(operation.description).split(/(?<=\.)\s/)[0]})),
      ...plain(operation.description).split("\n\n").slice(1).map((textContent) => make("p", {textContent})),
      tableOf("Parameters", parameters), tableOf("Form", rowsOf(form, document)), answerOf(operation, document));
  };

  const start = async () => {
    const document_ = await (await fetch("/openapi.json")).json();
    document.querySelector("#about").textContent = plain(document_.info.description).replace(/\n+/g, " ");
    const tags = new Map();
    for (const [path, operations] of Object.entries(document_.paths)) {
      for (const [method, operation] of Object.entries(operations)) {
        const tag = operation.tags?.[0] ?? "other";
        if (!tags.has(tag)) tags.set(tag, []);
        tags.get(tag).push(routeOf(method, path, operation, document_));
      }
    }
    const socket = make("details", {className: "card route"},
      make("summary", {}, make("code", {className: "method", textContent: "WS"}), " ", make("code", {textContent: "/v1/stream"}), " ", make("span", {className: "soft", textContent: "Take one voice out of sound while it comes."})),
      ...[
        "The first message of the client is the JSON of StreamStart; the server answers StreamReady. Then binary messages go both ways: blocks of samples of any length up to 1 MiB, by default 16-bit, little-endian, mono. As many samples come back as were sent, a little later.",
        "StreamChange changes the voice or its share at any time; StreamReady says that it is done, StreamProblem that it cannot be done. After {\"end\": true} the rest of the samples comes, StreamEnd, and the close with code 1000.",
        "If the server ends a stream, StreamProblem comes first, and then the close: 1013 all streams are in use, 1009 a message is too long, 1001 the server is stopping, 1011 the server failed, 1008 all else, such as a wrong message, or nothing that comes for 30 seconds.",
      ].map((textContent) => make("p", {textContent})));
    const order = ["extractions", "recordings", "voices", "server"];
    const schemas = Object.entries(document_.components.schemas).filter(([, schema]) => schema.properties);
    document.querySelector("#routes").append(
      ...[...tags].sort(([one], [other]) => order.indexOf(one) - order.indexOf(other)).map(([tag, routes]) => make("section", {}, make("h2", {className: "tag", textContent: tag[0].toUpperCase() + tag.slice(1)}), ...routes)),
      make("section", {}, make("h2", {className: "tag", textContent: "Live sound"}), socket),
      make("section", {}, make("h2", {className: "tag", textContent: "JSON"}), ...schemas.map(([name, schema]) => make("details", {className: "card route"}, make("summary", {}, make("code", {textContent: name}), " ", make("span", {className: "soft", textContent: plain(schema.description)})), tableOf("Fields", rowsOf(schema, document_))))),
    );
  };

  start();
}
