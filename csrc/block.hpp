// A block of documents: what a reader hands to the encoder, the filters and the hashers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cpt {

// Why a record holds no document.
struct Fault {
  std::int64_t line;  // from 1; a row of a parquet file
  std::string reason;
};

// Documents back to back. Texts and names are valid UTF-8 (readers refuse what is not).
struct Block {
  std::string text;
  std::vector<std::int64_t> ends;  // end of each document in `text`
  std::string names;               // the id of each document, back to back; empty where the corpus gives none
  std::vector<std::int64_t> name_ends;
  std::vector<std::int64_t> lines;  // line (from 1) at which each document's record begins
  std::vector<Fault> faults;        // records that were left out

  // The JSON lines the documents came from, back to back, and where the text's string (with its quotes)
  // stands in each. Kept when asked for, so that a changed text can be written with all other fields as
  // they were; documents of other files have no lines.
  enum class Origin { plain, json, kept_json };
  Origin origin = Origin::plain;
  std::string records;
  std::vector<std::int64_t> record_ends;
  std::vector<std::int64_t> string_starts;
  std::vector<std::int64_t> string_ends;

  std::size_t size() const { return ends.size(); }

  std::string_view document(std::size_t number) const { return slice(text, ends, number); }

  std::string_view name(std::size_t number) const { return slice(names, name_ends, number); }

  std::string_view record(std::size_t number) const { return slice(records, record_ends, number); }

  void add(std::string_view document_text, std::string_view document_name, std::int64_t line) {
    text.append(document_text);
    names.append(document_name);
    close(line);
  }

  // Makes a document of what was appended to `text` and `names` since the last one.
  void close(std::int64_t line) {
    ends.push_back(static_cast<std::int64_t>(text.size()));
    name_ends.push_back(static_cast<std::int64_t>(names.size()));
    lines.push_back(line);
  }

  // Keeps the line of the document that was closed last; `string` is the text's string inside of it.
  void keep(std::string_view record, std::string_view string) {
    const auto start = static_cast<std::int64_t>(records.size()) + (string.data() - record.data());
    string_starts.push_back(start);
    string_ends.push_back(start + static_cast<std::int64_t>(string.size()));
    records.append(record);
    record_ends.push_back(static_cast<std::int64_t>(records.size()));
  }

  // The documents with a set byte in `keep` (one a document), and all faults.
  Block select(const unsigned char* keep) const {
    Block chosen;
    chosen.origin = origin;
    chosen.faults = faults;
    for (std::size_t k = 0; k < size(); ++k) {
      if (!keep[k]) continue;
      chosen.add(document(k), name(k), lines[k]);
      if (origin != Origin::kept_json) continue;
      const auto from = static_cast<std::size_t>(string_starts[k]);
      chosen.keep(record(k), std::string_view(records).substr(from, static_cast<std::size_t>(string_ends[k]) - from));
    }
    return chosen;
  }

 private:
  static std::string_view slice(const std::string& all, const std::vector<std::int64_t>& ends, std::size_t number) {
    const auto start = static_cast<std::size_t>(number ? ends[number - 1] : 0);
    return std::string_view(all).substr(start, static_cast<std::size_t>(ends[number]) - start);
  }
};

}  // namespace cpt
