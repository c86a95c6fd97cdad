// Reconvergence points: threads of a warp that part at a branch continue together at the immediate post-dominator of
// the branch.
#include <algorithm>
#include <vector>

#include "module.h"

namespace ptx {
namespace {

struct Graph {
  std::vector<uint32_t> first;                   // the first instruction of each block; the last block is the end
  std::vector<std::vector<int>> next, previous;  // by block
};

bool ends_block(const Instruction& in) { return in.opcode->flow == Flow::kBranch || in.opcode->flow == Flow::kReturn; }

Graph graph_of(const std::vector<Instruction>& code) {
  const auto size = static_cast<uint32_t>(code.size());
  std::vector<uint32_t> first = {0, size};
  for (uint32_t pc = 0; pc < size; ++pc) {
    if (!ends_block(code[pc])) continue;
    first.push_back(pc + 1);
    if (code[pc].opcode->flow == Flow::kBranch) first.push_back(code[pc].target);
  }
  std::sort(first.begin(), first.end());
  first.erase(std::unique(first.begin(), first.end()), first.end());
  Graph graph;
  graph.first = first;
  graph.next.resize(first.size());
  graph.previous.resize(first.size());
  const auto block_at = [&](uint32_t pc) {
    return static_cast<int>(std::lower_bound(first.begin(), first.end(), pc) - first.begin());
  };
  for (size_t b = 0; b + 1 < first.size(); ++b) {
    const Instruction& last = code[first[b + 1] - 1];
    if (last.opcode->flow == Flow::kBranch) graph.next[b].push_back(block_at(last.target));
    if (last.opcode->flow == Flow::kReturn) graph.next[b].push_back(block_at(size));
    if (!ends_block(last) || last.guard >= 0) graph.next[b].push_back(static_cast<int>(b) + 1);
    for (const int to : graph.next[b]) graph.previous[to].push_back(static_cast<int>(b));
  }
  return graph;
}

// Returns the blocks in reverse postorder of the reversed graph, from the end on.
std::vector<int> backward_order(const Graph& graph) {
  std::vector<int> order;
  std::vector<char> seen(graph.first.size());
  std::vector<std::pair<int, size_t>> stack = {{static_cast<int>(graph.first.size()) - 1, 0}};
  seen[stack[0].first] = 1;
  while (!stack.empty()) {
    auto& [block, edge] = stack.back();
    if (edge == graph.previous[block].size()) {
      order.push_back(block);
      stack.pop_back();
      continue;
    }
    const int from = graph.previous[block][edge++];
    if (!seen[from]) seen[from] = 1, stack.push_back({from, 0});
  }
  std::reverse(order.begin(), order.end());
  return order;
}

// The algorithm of Cooper, Harvey and Kennedy, on the reversed graph. -1: the end cannot be reached.
std::vector<int> immediate_post_dominators(const Graph& graph) {
  const std::vector<int> order = backward_order(graph);
  std::vector<int> rank(graph.first.size(), -1), parent(graph.first.size(), -1);
  for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<int>(i);
  parent[order[0]] = order[0];
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = 1; i < order.size(); ++i) {
      int common = -1;
      for (int other : graph.next[order[i]]) {
        if (parent[other] < 0) continue;
        if (common < 0) common = other;
        while (common != other) {
          while (rank[other] > rank[common]) other = parent[other];
          while (rank[common] > rank[other]) common = parent[common];
        }
      }
      changed |= parent[order[i]] != common;
      parent[order[i]] = common;
    }
  }
  return parent;
}

}  // namespace

void find_reconvergence(Function& function) {
  const Graph graph = graph_of(function.code);
  const std::vector<int> parent = immediate_post_dominators(graph);
  for (size_t b = 0; b + 1 < graph.first.size(); ++b) {
    Instruction& last = function.code[graph.first[b + 1] - 1];
    const int joined = parent[b] < 0 ? static_cast<int>(graph.first.size()) - 1 : parent[b];
    last.reconvergence = graph.first[joined];
  }
}

}  // namespace ptx
