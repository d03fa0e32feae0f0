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

  std::size_t size() const { return ends.size(); }

  std::string_view document(std::size_t number) const { return slice(text, ends, number); }

  std::string_view name(std::size_t number) const { return slice(names, name_ends, number); }

  void add(std::string_view document_text, std::string_view document_name, std::int64_t line) {
    text.append(document_text);
    ends.push_back(static_cast<std::int64_t>(text.size()));
    names.append(document_name);
    name_ends.push_back(static_cast<std::int64_t>(names.size()));
    lines.push_back(line);
  }

 private:
  static std::string_view slice(const std::string& all, const std::vector<std::int64_t>& ends, std::size_t number) {
    const auto start = static_cast<std::size_t>(number ? ends[number - 1] : 0);
    return std::string_view(all).substr(start, static_cast<std::size_t>(ends[number]) - start);
  }
};

}  // namespace cpt
